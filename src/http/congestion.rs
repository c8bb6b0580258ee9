//! How a connection finds its pace: on loopback it needs none.
//!
//! A system may pace whatever it sends (BBR does), and then paces loopback too: a timer for each 64 KiB, which takes a virtual machine
//! more time than to send them. Where that is so, connections within this host go by what every kernel has, and all others by what the
//! system has chosen. Elsewhere nothing is chosen here.
//!
//! What is accepted begins with what the listening socket goes by. It has to begin with the plain one: a connection that was paced
//! once is paced whatever is chosen later.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
use rustix::net::{AddressFamily, SocketType, getsockname, socket};

/// Paces nothing, and is part of every kernel.
const PLAIN: &str = "reno";
/// So all begin that pace on loopback.
const PACED: &str = "bbr";

/// What the connections of one listening socket go by.
#[derive(Debug)]
pub(super) struct Congestion {
    begins_plain: bool,
}

impl Congestion {
    /// Has all connections that are accepted from now on begin with the plain one, where the system paces.
    pub(super) fn of(listener: impl AsFd) -> Self {
        let begins_plain = system_paces().unwrap_or(false) && set_tcp_congestion(listener, PLAIN).is_ok();
        Self { begins_plain }
    }

    /// Chooses for a connection that was accepted, before anything is sent.
    pub(super) fn choose(&self, socket: impl AsFd, client: IpAddr) {
        // A route may have its own.
        if !self.begins_plain || is_within_host(&socket, client) || !goes_by_plain(&socket) {
            return;
        }
        let chosen = system_socket().and_then(|(_, usual)| Ok(set_tcp_congestion(&socket, &usual)?));
        if let Err(error) = chosen {
            tracing::debug!(%client, %error, "a connection goes by reno, and not as the system wants");
        }
    }
}

fn goes_by_plain(socket: impl AsFd) -> bool {
    tcp_congestion(socket).is_ok_and(|found| found == PLAIN)
}

/// Whether both ends are on this host, which may be asked by an address on the LAN too.
fn is_within_host(socket: impl AsFd, client: IpAddr) -> bool {
    let own = getsockname(socket).ok().and_then(|own| SocketAddr::try_from(own).ok());
    let client = client.to_canonical();
    client.is_loopback() || own.is_some_and(|own| own.ip().to_canonical() == client)
}

/// Whether the system paces, and lets this process choose both ways: nothing is chosen that can't be taken back.
fn system_paces() -> io::Result<bool> {
    let (socket, usual) = system_socket()?;
    if !usual.starts_with(PACED) {
        return Ok(false);
    }
    set_tcp_congestion(&socket, PLAIN)?;
    set_tcp_congestion(&socket, &usual)?;
    Ok(true)
}

/// A socket that goes by what the system has chosen, and what that is.
fn system_socket() -> io::Result<(OwnedFd, String)> {
    let socket = match socket(AddressFamily::INET, SocketType::STREAM, None) {
        Ok(socket) => socket,
        // A kernel or a sandbox without IPv4.
        Err(_) => socket(AddressFamily::INET6, SocketType::STREAM, None)?,
    };
    let usual = tcp_congestion(&socket)?;
    Ok((socket, usual))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn where_the_system_paces_connections_within_the_host_are_not_and_elsewhere_nothing_is_chosen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (_, usual) = system_socket().unwrap();
        let congestion = Congestion::of(&listener);
        let chosen_for = |client: &str| {
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (socket, _) = listener.accept().unwrap();
            congestion.choose(&socket, client.parse().unwrap());
            tcp_congestion(&socket).unwrap()
        };
        let within = if usual.starts_with(PACED) { PLAIN } else { &usual };
        for client in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(chosen_for(client), within);
        }
        for client in ["192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"] {
            assert_eq!(chosen_for(client), usual);
        }
    }

    #[test]
    fn what_a_route_chose_stays() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (_, usual) = system_socket().unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        // As if this host would begin with the plain one: the connection began with the usual one.
        Congestion { begins_plain: true }.choose(&socket, "192.0.2.1".parse().unwrap());
        assert_eq!(tcp_congestion(&socket).unwrap(), usual);
    }
}
