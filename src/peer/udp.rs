//! Announcements and questions by datagram. One task owns each socket; questions are answered beside it, so that a
//! slow store never makes the socket deaf.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustix::net::{AddressFamily, SocketType};
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::record::{PeerId, Source};
use super::registry::Sighting;
use super::wire::{Announce, MAX_DATAGRAM, Message};
use super::{LocalPaths, Peers};

/// Questions that are being answered at the same time; more are dropped, and the asker asks again.
const ANSWERING: usize = 64;
/// How long an answer may take to find: later it is of no use to the asker.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// An announcement of one peer is answered no more often than this.
const GREETING_PAUSE: Duration = Duration::from_secs(2);
/// The receive buffer, in bytes: questions of a LAN that come at once.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// The sockets of one port, of both families where there are both.
#[derive(Clone, Debug)]
pub(super) struct Sockets {
    v4: Option<Arc<UdpSocket>>,
    v6: Option<Arc<UdpSocket>>,
}

impl Sockets {
    /// Binds the port for both families. An error only if neither can be had.
    pub(super) fn bind(port: u16) -> std::io::Result<Self> {
        let v4 = bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
        let port = match &v4 {
            // The system chose a port: the other family takes the same.
            Ok(socket) => socket.local_addr()?.port(),
            Err(_) => port,
        };
        let v6 = bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
        match (v4, v6) {
            (Err(error), Err(_)) => Err(error),
            (v4, v6) => {
                warn_of_taken("IPv4", &v4, port);
                warn_of_taken("IPv6", &v6, port);
                Ok(Self { v4: v4.ok().map(Arc::new), v6: v6.ok().map(Arc::new) })
            }
        }
    }

    /// The port, which the system chose if 0 was asked for.
    pub(super) fn port(&self) -> Option<u16> {
        self.all().find_map(|socket| socket.local_addr().ok()).map(|address| address.port())
    }

    /// Sends a datagram. That nobody is there, or no way to them, is no error.
    pub(super) async fn send(&self, datagram: &[u8], to: SocketAddr) {
        let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
        if let Some(socket) = socket
            && let Err(error) = socket.send_to(datagram, to).await
        {
            tracing::trace!(%to, %error, "a datagram was not sent");
        }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<UdpSocket>> {
        self.v4.iter().chain(&self.v6)
    }
}

/// A family that there is not is nobody's concern.
fn warn_of_taken(family: &str, bound: &std::io::Result<UdpSocket>, port: u16) {
    if let Err(error) = bound
        && error.kind() == std::io::ErrorKind::AddrInUse
    {
        tracing::warn!(port, %error, "no announcements over {family}: another program has the UDP port; end it, or choose another for all hosts with discovery.port");
    }
}

fn bind(address: SocketAddr) -> std::io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(
        family,
        SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
        None,
    )?;
    if address.is_ipv6() {
        rustix::net::sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::sockopt::set_socket_broadcast(&socket, true)?;
    // A smaller buffer loses questions, which are asked again; it is no reason not to start.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER);
    rustix::net::bind(&socket, &address)?;
    UdpSocket::from_std(socket.into())
}

/// Receives until dropped.
pub(super) async fn receive(peers: Peers, sockets: Sockets, local_paths: LocalPaths, allow: Arc<[IpNet]>) {
    let answering = Arc::new(Semaphore::new(ANSWERING));
    let receivers = sockets.all().map(|socket| {
        let reception = Reception {
            peers: peers.clone(),
            sockets: sockets.clone(),
            local_paths: local_paths.clone(),
            answering: Arc::clone(&answering),
            allow: Arc::clone(&allow),
        };
        reception.run(Arc::clone(socket))
    });
    futures_util::future::join_all(receivers).await;
}

struct Reception {
    peers: Peers,
    sockets: Sockets,
    local_paths: LocalPaths,
    answering: Arc<Semaphore>,
    allow: Arc<[IpNet]>,
}

impl Reception {
    async fn run(self, socket: Arc<UdpSocket>) {
        let mut buffer = [0; MAX_DATAGRAM + 1];
        loop {
            match socket.recv_from(&mut buffer).await {
                Ok((len, from)) => {
                    let message = buffer.get(..len).and_then(Message::parse);
                    self.peers.metrics().datagram_received(message.is_some());
                    if let Some(message) = message.filter(|_| self.is_allowed(from.ip())) {
                        self.take(message, from).await;
                    }
                }
                // What a network says of an earlier datagram (nobody there, link down) concerns no later one.
                Err(error) => {
                    tracing::debug!(%error, "a datagram can't be received");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    fn is_allowed(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.allow.iter().any(|network| network.contains(&address))
    }

    async fn take(&self, message: Message, from: SocketAddr) {
        match message {
            Message::Announce(announce) => {
                let (is_reply, id) = (announce.reply, announce.id.clone());
                let id = id.map_or_else(
                    || PeerId::place(SocketAddr::new(from.ip().to_canonical(), announce.port)),
                    |id| PeerId::instance(&id),
                );
                let sighting = self.peers.announced(announce, from, Source::Announced);
                let answerable = matches!(sighting, Sighting::New | Sighting::Known) && !is_reply;
                if answerable
                    && self.peers.registry().greet(&id, from.ip(), GREETING_PAUSE, Instant::now())
                    && let Some(ours) = self.peers.own_announce_to(from)
                {
                    let reply = Message::Announce(Announce { reply: true, ..ours });
                    self.sockets.send(&reply.to_datagram(), from).await;
                }
            }
            Message::Goodbye(id) => self.peers.goodbye(&id, from.ip()),
            Message::Gained(_) if !self.peers.knows(from.ip()) => {}
            Message::Gained(hashes) => self.peers.gained(hashes, from.ip()),
            Message::HasPath(hash) => self.answer(from, hash, None),
            Message::HasPathWithNarHash(hash, nar_hash) => self.answer(from, hash, Some(nar_hash)),
            Message::Ping => self.sockets.send(&Message::Pong.to_datagram(), from).await,
            // Answers go to the sockets of their questions; here they are strays.
            Message::Pong | Message::Yes | Message::NarHashMismatch | Message::NotFound => {}
        }
    }

    fn answer(&self, to: SocketAddr, hash: crate::nix::StorePathHash, wanted: Option<crate::nix::NarHash>) {
        let Ok(permit) = Arc::clone(&self.answering).try_acquire_owned() else { return };
        let (local_paths, sockets) = (self.local_paths.clone(), self.sockets.clone());
        tokio::spawn(async move {
            // Silence is the right answer of a host that does not know.
            if let Ok(Some(held)) = timeout(ANSWER_TIME, local_paths.nar_hash(hash)).await {
                let answer = match (held, wanted) {
                    (None, _) => Message::NotFound,
                    (Some(held), Some(wanted)) if held != wanted => Message::NarHashMismatch,
                    (Some(_), _) => Message::Yes,
                };
                sockets.send(&answer.to_datagram(), to).await;
            }
            drop(permit);
        });
    }
}
