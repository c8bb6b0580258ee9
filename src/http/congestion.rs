//! How a connection finds its pace: on loopback it needs none.
//!
//! A system may pace whatever it sends (BBR does), and then paces loopback too: a timer for each 64 KiB, which takes a virtual
//! machine more time than to send them. Where that is so at the start, connections within this host go by what every kernel has,
//! and all others by what the system has chosen. Elsewhere nothing is chosen here.
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
    /// What the system had chosen, where connections begin with the plain one.
    usual: Option<String>,
}

impl Congestion {
    /// Has all connections that are accepted from now on begin with the plain one, where the system paces.
    pub(super) fn of(listener: impl AsFd) -> Self {
        let usual = pacing().ok().flatten();
        Self { usual: usual.filter(|_| set_tcp_congestion(listener, PLAIN).is_ok()) }
    }

    /// Chooses for a connection that was accepted, before anything is sent.
    pub(super) fn choose(&self, socket: impl AsFd, client: IpAddr) {
        let Some(usual) = self.usual.as_ref().filter(|_| !is_within_host(&socket, client)) else { return };
        // As it is by now, unless there is no descriptor to ask with.
        let chosen = system_socket().map_or_else(|_| usual.clone(), |(_, usual)| usual);
        if let Err(error) = put_back(socket, &chosen) {
            tracing::debug!(%client, %error, "a connection goes by reno, and not as the system wants");
        }
    }
}

/// Chooses for a connection that still goes by the plain one: a route may have its own. One that has the plain one is not told apart.
fn put_back(socket: impl AsFd, usual: &str) -> io::Result<()> {
    if tcp_congestion(&socket)? == PLAIN {
        set_tcp_congestion(socket, usual)?;
    }
    Ok(())
}

/// Whether both ends are on this host, which may be asked by an address on the LAN too.
fn is_within_host(socket: impl AsFd, client: IpAddr) -> bool {
    let own = getsockname(socket).ok().and_then(|own| SocketAddr::try_from(own).ok());
    let client = client.to_canonical();
    client.is_loopback() || own.is_some_and(|own| own.ip().to_canonical() == client)
}

/// By what the system paces, if it does, and lets this process choose both ways: nothing is chosen that can't be taken back.
fn pacing() -> io::Result<Option<String>> {
    let (socket, usual) = system_socket()?;
    if !usual.starts_with(PACED) {
        return Ok(None);
    }
    set_tcp_congestion(&socket, PLAIN)?;
    set_tcp_congestion(&socket, &usual)?;
    Ok(Some(usual))
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
        put_back(&socket, PLAIN).unwrap();
        assert_eq!(tcp_congestion(&socket).unwrap(), usual);
    }
}
