//! How a connection finds its pace: on loopback it needs none.
//!
//! A system may pace whatever it sends (BBR does), and then paces loopback too: a timer for each 64 KiB, which takes a virtual machine
//! more time than to send them. Connections on loopback go by what every kernel has, and all others by what the system has chosen.
//!
//! What is accepted begins with what the listening socket goes by. It has to begin with the plain one: a connection that was paced
//! once is paced whatever is chosen later.

use std::net::IpAddr;
use std::os::fd::AsFd;

use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};

/// Paces nothing, is part of every kernel, and may be chosen by everybody.
const PLAIN: &str = "reno";

/// What the connections of one listening socket go by.
#[derive(Debug)]
pub(super) struct Congestion {
    /// For what comes from other hosts, where connections begin with another one.
    usual: Option<String>,
}

impl Congestion {
    /// Has all connections that are accepted from now on begin with the plain one.
    pub(super) fn of(listener: impl AsFd) -> Self {
        let usual = tcp_congestion(&listener).ok().filter(|usual| usual != PLAIN);
        // Nothing is chosen that could not be taken back.
        let may_choose = |usual: &String| {
            set_tcp_congestion(&listener, usual).is_ok() && set_tcp_congestion(&listener, PLAIN).is_ok()
        };
        Self { usual: usual.filter(may_choose) }
    }

    /// Chooses for a connection that was accepted, before anything is sent.
    pub(super) fn choose(&self, socket: impl AsFd, client: IpAddr) {
        let Some(usual) = &self.usual else { return };
        if !client.to_canonical().is_loopback()
            && let Err(error) = set_tcp_congestion(socket, usual)
        {
            // Where a route has its own, it stays.
            tracing::debug!(%client, usual, %error, "a connection goes by another congestion control");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn loopback_is_not_paced_and_others_go_by_what_is_usual() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut usual = tcp_congestion(&listener).unwrap();
        if usual == PLAIN {
            usual = "cubic".to_owned();
            set_tcp_congestion(&listener, &usual).unwrap();
        }
        let congestion = Congestion::of(&listener);
        let chosen_for = |client: &str| {
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (socket, _) = listener.accept().unwrap();
            assert_eq!(tcp_congestion(&socket).unwrap(), PLAIN);
            congestion.choose(&socket, client.parse().unwrap());
            tcp_congestion(&socket).unwrap()
        };
        for local in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(chosen_for(local), PLAIN);
        }
        for other in ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"] {
            assert_eq!(chosen_for(other), usual);
        }
    }

    #[test]
    fn where_the_plain_one_is_usual_nothing_is_chosen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        set_tcp_congestion(&listener, PLAIN).unwrap();
        assert_eq!(Congestion::of(&listener).usual, None);
    }
}
