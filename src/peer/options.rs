//! `[discovery]` and `[[peer]]`: what can be set about finding peers.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;

/// `[discovery]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Whether peers are looked for at all. Default true.
    pub enable: bool,
    /// UDP port of announcements and questions. Default 9999; 0 lets the system choose one, and then only `targets` are
    /// announced to.
    pub port: u16,
    /// Whether peers are looked for by multicast DNS too. Default true.
    pub mdns: bool,
    /// Further addresses that announcements are sent to, for hosts that broadcast can't reach. Default: none.
    pub targets: Vec<SocketAddr>,
    /// How often this host announces itself. 100ms to 10min; default 10s.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// After how much silence a peer is forgotten. At least twice the interval; default 60s.
    #[serde(with = "humantime_serde")]
    pub ttl: Duration,
    /// How many peers are known at most. 1 to 10,000; default 1,000.
    pub peers: usize,
}

/// `[[peer]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfiguredPeer {
    /// A binary cache that serves uncompressed NARs: peernix, harmonia, nix-serve. `http://host:port/path`
    pub url: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            enable: true,
            port: 9999,
            mdns: true,
            targets: Vec::new(),
            interval: Duration::from_secs(10),
            ttl: Duration::from_secs(60),
            peers: 1000,
        }
    }
}

impl Options {
    /// What is out of range, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        let interval = Duration::from_millis(100)..=Duration::from_secs(600);
        if !interval.contains(&self.interval) {
            return Err("discovery.interval: has to be 100ms to 10min".to_owned());
        }
        if self.ttl < self.interval * 2 || self.ttl > Duration::from_secs(24 * 60 * 60) {
            return Err(
                "discovery.ttl: has to be twice discovery.interval at least, and 1day at most".to_owned()
            );
        }
        if !(1..=10_000).contains(&self.peers) {
            return Err("discovery.peers: has to be 1 to 10000".to_owned());
        }
        Ok(())
    }
}

impl ConfiguredPeer {
    /// What is wrong with it, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        if self.url.starts_with("https://") {
            return Err(format!(
                "peer.url: {:?}: only http:// so far; what comes is verified by its signature",
                self.url
            ));
        }
        let host = self.url.strip_prefix("http://");
        let good = host.is_some_and(|host| !host.is_empty() && !host.starts_with('/'))
            && self.url.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#' | b'@'));
        if good { Ok(()) } else { Err(format!("peer.url: {:?} is not http://host:port/path", self.url)) }
    }
}
