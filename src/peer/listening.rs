//! Where this host's own cache is reached: an announcement that leads elsewhere is worse than none.
//!
//! Pure: the addresses that are listened on in, ports out.

use std::net::{IpAddr, SocketAddr};

/// The addresses that are listened on, with their real ports.
#[derive(Clone, Debug)]
pub struct Listening(Box<[SocketAddr]>);

impl Listening {
    /// On these.
    #[must_use]
    pub fn new(addresses: &[SocketAddr]) -> Self {
        Self(addresses.into())
    }

    /// The port of the cache at this address of the host. `None`: nobody listens there.
    pub(super) fn port_at(&self, ip: IpAddr) -> Option<u16> {
        let ip = ip.to_canonical();
        let of_all = |listened: IpAddr| {
            // All IPv6 addresses are all IPv4 addresses too.
            listened.is_unspecified() && (listened.is_ipv6() || ip.is_ipv4())
        };
        let exact = self.0.iter().find(|listened| listened.ip().to_canonical() == ip);
        exact.or_else(|| self.0.iter().find(|listened| of_all(listened.ip()))).map(SocketAddr::port)
    }

    /// The port that is told where only one can be: an address that others can reach goes before loopback.
    #[must_use]
    pub fn port(&self) -> u16 {
        let reachable = self.0.iter().find(|listened| !listened.ip().is_loopback());
        reachable.or(self.0.first()).map_or(0, SocketAddr::port)
    }

    /// Whether other hosts can reach it at all.
    pub(super) fn is_reachable(&self) -> bool {
        self.0.iter().any(|listened| !listened.ip().is_loopback())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_the_port_that_is_listened_on_there_and_others_have_none() {
        let listening = |addresses: &[&str]| {
            Listening::new(&addresses.iter().map(|address| address.parse().unwrap()).collect::<Vec<_>>())
        };
        let port_at = |listening: &Listening, ip: &str| listening.port_at(ip.parse().unwrap());
        let all = listening(&["[::]:9999"]);
        for ip in ["10.0.0.1", "127.0.0.1", "fe80::1", "::1"] {
            assert_eq!(port_at(&all, ip), Some(9999), "{ip}");
        }
        let v4 = listening(&["127.0.0.1:1", "0.0.0.0:9999"]);
        assert_eq!(port_at(&v4, "::ffff:10.0.0.1"), Some(9999));
        assert_eq!((port_at(&v4, "127.0.0.1"), port_at(&v4, "fe80::1")), (Some(1), None));
        assert_eq!((v4.port(), v4.is_reachable()), (9999, true));
        let some = listening(&["127.0.0.1:1", "10.0.0.1:2", "[fd00::1]:3"]);
        for (ip, port) in [("10.0.0.1", Some(2)), ("10.0.0.2", None), ("fd00::1", Some(3)), ("fe80::1", None)]
        {
            assert_eq!(port_at(&some, ip), port, "{ip}");
        }
        let own = listening(&["127.0.0.1:1", "[::1]:2"]);
        assert_eq!((own.port(), own.is_reachable()), (1, false));
    }
}
