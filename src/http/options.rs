//! `[http]` and `[limits]`: what can be set about serving.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use bytesize::ByteSize;
use ipnet::IpNet;
use serde::Deserialize;

/// `[http]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Addresses to listen on. Default: port 9999 on all, IPv6 and IPv4.
    pub listen: Vec<SocketAddr>,
    /// Networks that are answered; others get 403. Default: loopback, private, unique-local, link-local, 100.64.0.0/10.
    pub allow: Vec<IpNet>,
    /// Networks for which peers are asked, besides loopback; everybody else gets what is here. Default: none.
    pub relay_for: Vec<IpNet>,
    /// What nix-cache-info says of the order of caches: the lower, the earlier. Default 30; cache.nixos.org has 40.
    pub priority: u32,
    /// Whether nix-cache-info invites clients to ask for many paths at once. Default true.
    pub want_mass_query: bool,
    /// How narinfos of the local store name their NARs to clients that are no peers. Default: none.
    pub compression: Compression,
    /// How long answers in flight may go on after the daemon was asked to stop. 0s to 1h; default 30s.
    #[serde(with = "humantime_serde")]
    pub drain_time: Duration,
}

/// How NARs are offered to clients that are no peers. Peers settle that among themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// As they are: with ranges, and resumed where they broke off.
    #[default]
    None,
    /// As zstd: without either, for clients behind a link that is slower than about 200 MB/s.
    Zstd,
}

impl Default for Options {
    fn default() -> Self {
        let networks = [
            "127.0.0.0/8",
            "::1/128",
            "10.0.0.0/8",
            "172.16.0.0/12",
            "192.168.0.0/16",
            "fc00::/7",
            "169.254.0.0/16",
            "fe80::/10",
            "100.64.0.0/10",
        ];
        Self {
            listen: vec![SocketAddr::from(([0u16; 8], 9999))],
            allow: networks.iter().filter_map(|network| network.parse().ok()).collect(),
            relay_for: Vec::new(),
            priority: 30,
            want_mass_query: true,
            compression: Compression::None,
            drain_time: Duration::from_secs(30),
        }
    }
}

impl Options {
    /// What is out of range, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        if self.listen.is_empty() {
            return Err("http.listen: has to name one address at least".to_owned());
        }
        let repeated = self
            .listen
            .iter()
            .enumerate()
            .find(|(at, address)| address.port() != 0 && self.listen[..*at].contains(address));
        if let Some((_, address)) = repeated {
            return Err(format!("http.listen: names {address} twice"));
        }
        if self.drain_time > Duration::from_secs(3600) {
            return Err("http.drain_time: has to be 0s to 1h".to_owned());
        }
        Ok(())
    }

    /// Where this host's own Nix may ask. `None`: nowhere, since no address of `listen` is on loopback.
    #[must_use]
    pub fn loopback(&self) -> Option<SocketAddr> {
        let on_loopback = |address: &SocketAddr| match address.ip() {
            // All of IPv6 is all of IPv4 too.
            ip if ip.is_unspecified() => Some(SocketAddr::from(([127, 0, 0, 1], address.port()))),
            ip => ip.is_loopback().then_some(*address),
        };
        self.listen.iter().find_map(on_loopback)
    }

    /// Why this host's own Nix is not answered, as `key: why`. `None`: it is. A host may want that, so it is no error.
    #[must_use]
    pub fn shuts_out_own_nix(&self) -> Option<String> {
        match self.loopback() {
            None => {
                let port = self.listen.first().map_or(9999, SocketAddr::port);
                Some(format!(
                    "http.listen: has no address on loopback, so this host's own Nix can't ask: add 127.0.0.1:{port}"
                ))
            }
            Some(address) if !self.allow.iter().any(|network| network.contains(&address.ip())) => {
                let network = IpNet::from(address.ip());
                Some(format!("http.allow: does not have {network}, so this host's own Nix gets 403: add it"))
            }
            Some(_) => None,
        }
    }
}

/// `[limits]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections that may be open. Loopback has as many of its own, so that no LAN can crowd out the local Nix; where there are not descriptors for all, each side has half. 1 to
    /// 1,000,000; default 1,024.
    pub connections: usize,
    /// Connections from one address; loopback exempt. 1 to 1,000,000; default 128 (Nix opens 25).
    pub connections_per_address: usize,
    /// Longest request line and headers. 1 KiB to 256 KiB; default 16 KiB.
    pub header_size: ByteSize,
    /// How long a request's headers may take to arrive, from their first byte on. 100ms to 10min; default 10s.
    #[serde(with = "humantime_serde")]
    pub header_time: Duration,
    /// How long a connection may stand still: no request, or a client that does not read its answer. 100ms to 1h;
    /// default 60s.
    #[serde(with = "humantime_serde")]
    pub idle_time: Duration,
    /// Requests a second from one address, twice that in a burst; loopback exempt. More get 429. Default 5,000;
    /// 0 is no limit.
    pub requests_per_second: u32,
    /// Memory for NARs of peers on their way: small ones whole, 4 MiB of each larger one, up to 16 MiB more of one from several peers; more wait. At least resolve.verify_first, at most 64 GiB; default 64 MiB.
    pub relay_memory: ByteSize,
    /// Disk for NARs of peers that several clients read at once, in the state folder. 0 is none; default 4 GiB.
    pub spool: ByteSize,
    /// Disk for copies of NARs of many small files, in the state folder: at most this, and none is begun with which they would take
    /// more than a tenth of what the disk would have free without them. One takes a quarter of this at most, and a sixteenth of
    /// the memory; as much is kept free for the next. Those that nobody has asked for the longest go first. 0 is none, else at
    /// least 16 MiB; default 1 GiB.
    pub nar_copies: ByteSize,
    /// Threads that pack NARs as zstd at once: for peers where that is faster than the link, and none of them if this is 0. At most
    /// 1024, and never more than processors. Default: half of them, since the rest has other work, or two.
    pub compressors: Option<usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            connections_per_address: 128,
            header_size: ByteSize::kib(16),
            header_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(60),
            requests_per_second: 5000,
            relay_memory: ByteSize::mib(64),
            spool: ByteSize::gib(4),
            nar_copies: ByteSize::gib(1),
            compressors: None,
        }
    }
}

impl Limits {
    /// What is out of range, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        let range = |key: &str, good: bool, range: &str| {
            if good { Ok(()) } else { Err(format!("limits.{key}: has to be {range}")) }
        };
        let connections = 1..=1_000_000;
        range("connections", connections.contains(&self.connections), "1 to 1000000")?;
        let per_address = connections.contains(&self.connections_per_address);
        range("connections_per_address", per_address, "1 to 1000000")?;
        let header_size = (ByteSize::kib(1)..=ByteSize::kib(256)).contains(&self.header_size);
        range("header_size", header_size, "1 KiB to 256 KiB")?;
        let nar_copies = self.nar_copies.as_u64() == 0 || self.nar_copies >= ByteSize::mib(16);
        range(
            "nar_copies",
            nar_copies,
            "0 or at least 16 MiB: one copy takes 4 MiB at least, and a quarter of it at most",
        )?;
        range("relay_memory", self.relay_memory <= ByteSize::gib(64), "at most 64 GiB")?;
        range("compressors", self.compressors.is_none_or(|threads| threads <= 1024), "0 to 1024")?;
        let shortest = Duration::from_millis(100);
        let header_time = (shortest..=Duration::from_secs(600)).contains(&self.header_time);
        range("header_time", header_time, "100ms to 10min")?;
        let idle_time = (shortest..=Duration::from_secs(3600)).contains(&self.idle_time);
        range("idle_time", idle_time, "100ms to 1h")
    }

    pub(super) fn compressors(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        self.compressors.unwrap_or(processors.div_ceil(2).max(2)).min(processors)
    }

    pub(super) fn rate(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.requests_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_shuts_out_the_own_nix_is_told() {
        for (listen, allow, where_, told) in [
            ("[::]:9999", "127.0.0.0/8", Some("127.0.0.1:9999"), None),
            ("0.0.0.0:1", "0.0.0.0/0", Some("127.0.0.1:1"), None),
            ("[::1]:2", "::1/128", Some("[::1]:2"), None),
            (
                "127.0.0.2:3",
                "10.0.0.0/8",
                Some("127.0.0.2:3"),
                Some("http.allow: does not have 127.0.0.2/32"),
            ),
            ("[::]:9999", "::1/128", Some("127.0.0.1:9999"), Some("http.allow: does not have 127.0.0.1/32")),
            ("10.0.0.1:4", "127.0.0.0/8", None, Some("http.listen: has no address on loopback")),
        ] {
            let options = Options {
                listen: vec!["10.0.0.9:9".parse().unwrap(), listen.parse().unwrap()],
                allow: vec![allow.parse().unwrap()],
                ..Options::default()
            };
            assert_eq!(options.loopback().map(|address| address.to_string()).as_deref(), where_);
            let why = options.shuts_out_own_nix();
            assert_eq!(why.is_some(), told.is_some(), "{listen}");
            assert!(why.unwrap_or_default().starts_with(told.unwrap_or_default()), "{listen}");
        }
        assert_eq!(Options::default().shuts_out_own_nix(), None);
    }
}
