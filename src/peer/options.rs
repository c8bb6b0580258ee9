//! `[discovery]` and `[[peer]]`: what can be set about finding peers.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use reqwest::Url;
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
    /// A binary cache that serves uncompressed NARs: peernix, harmonia, nix-serve. `http://host:port/path`, or
    /// `https://` with a certificate that this system's authorities vouch for.
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
            let (ttl, least) = (self.ttl, self.interval * 2);
            return Err(format!(
                "discovery.ttl: is {ttl:?}, and has to be twice discovery.interval ({least:?}) at least, and 1day at most"
            ));
        }
        if !(1..=10_000).contains(&self.peers) {
            return Err("discovery.peers: has to be 1 to 10000".to_owned());
        }
        // Sent there, an announcement would come back to this host.
        let is_nobody =
            |target: &&SocketAddr| target.ip().to_canonical().is_unspecified() || target.port() == 0;
        if let Some(target) = self.targets.iter().find(is_nobody) {
            return Err(format!(
                "discovery.targets: {target} is no address of a host; write the other host's own, as \
                 \"192.168.1.10:9999\" or \"[fd00::10]:9999\""
            ));
        }
        Ok(())
    }
}

impl ConfiguredPeer {
    /// What is wrong with one of them, as `key: value: what; what to do`.
    pub fn check_all(peers: &[Self]) -> Result<(), String> {
        let mut known = HashSet::new();
        for peer in peers {
            let wrong = |what| format!("peer.url: {:?}: {what}", peer.url);
            let url = peer.parse().map_err(wrong)?;
            if !known.insert(url.as_str().trim_end_matches('/').to_owned()) {
                return Err(wrong("it is there twice; take one away".to_owned()));
            }
        }
        Ok(())
    }

    /// The URL, or what is wrong and what to do.
    fn parse(&self) -> Result<Url, String> {
        const FORM: &str = "write http://host:port/path";
        // The parser makes something of nearly everything; what it would mend is not taken.
        let rest = self.url.strip_prefix("http://").or_else(|| self.url.strip_prefix("https://"));
        let Some(rest) = rest else { return Err(format!("it has neither http:// nor https://; {FORM}")) };
        if rest.is_empty() || rest.starts_with(['/', ':', '?', '#']) {
            return Err(format!("it names no host; {FORM}"));
        }
        if rest.bytes().any(|byte| !byte.is_ascii_graphic() || byte == b'\\') {
            return Err(format!("it has a character that no URL has; {FORM}"));
        }
        let url = Url::parse(&self.url).map_err(|error| format!("{error}; {FORM}"))?;
        if url.port() == Some(0) {
            return Err("nobody can be reached at port 0; name the port that the cache listens on".to_owned());
        }
        if !url.username().is_empty() || url.password().is_some() || rest.contains('@') {
            return Err(
                "a user and a password are sent to no cache; leave out what is before the @".to_owned()
            );
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("paths are put behind it; leave out everything from ? or # on".to_owned());
        }
        Ok(url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(urls: &[&str]) -> Result<(), String> {
        let peers = urls.iter().map(|url| ConfiguredPeer { url: (*url).to_owned() });
        ConfiguredPeer::check_all(&peers.collect::<Vec<_>>())
    }

    #[test]
    fn an_address_that_is_no_hosts_is_no_target() {
        let check =
            |target: &str| Options { targets: vec![target.parse().unwrap()], ..Options::default() }.check();
        for target in ["192.168.1.10:9999", "[fd00::10]:9999", "127.0.0.1:1"] {
            assert_eq!(check(target), Ok(()), "{target}");
        }
        for target in ["0.0.0.0:9999", "[::]:9999", "[::ffff:0.0.0.0]:9999", "192.168.1.10:0"] {
            assert!(check(target).unwrap_err().contains("is no address of a host"), "{target}");
        }
    }

    #[test]
    fn urls_of_caches_are_taken() {
        for url in [
            "http://cache",
            "http://cache:5000",
            "https://cache.example.org/nix-cache/",
            "http://[fd00::1]:9999/nix-cache",
            "http://10.0.0.1:1",
        ] {
            assert_eq!(check(&[url]), Ok(()), "{url}");
        }
        assert_eq!(check(&["http://a", "https://a", "http://a:81", "http://a/b"]), Ok(()));
    }

    #[test]
    fn what_is_none_is_told_in_one_line_that_says_what_to_do() {
        for (url, what) in [
            ("", "neither"),
            ("cache:5000", "neither"),
            ("ftp://cache", "neither"),
            ("http://", "no host"),
            ("http:///path", "no host"),
            ("http://:80", "no host"),
            ("http://a b", "character"),
            ("http://a\\b", "character"),
            ("http://a\nb", "character"),
            ("http://cache:0", "port 0"),
            ("http://cache:99999", "invalid port"),
            ("http://cache:x", "invalid port"),
            ("http://300.1.1.1", "invalid IPv4"),
            ("http://[::g]", "invalid IPv6"),
            ("http://me@cache", "before the @"),
            ("http://me:secret@cache", "before the @"),
            ("http://@cache", "before the @"),
            ("http://cache?x", "from ? or #"),
            ("http://cache/#", "from ? or #"),
        ] {
            let told = check(&[url]).unwrap_err();
            assert!(
                told.starts_with(&format!("peer.url: {url:?}: ")) && told.contains(what),
                "{url}: {told}"
            );
            assert!(told.contains("; ") && !told.contains('\n'), "{told}");
        }
        for twice in ["http://a/x/", "http://A:80/x"] {
            let told = check(&["http://a/x", twice]).unwrap_err();
            assert!(told.contains(&format!("{twice:?}: it is there twice")), "{told}");
        }
    }
}
