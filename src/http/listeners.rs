//! The sockets that wait for connections: bound, and accepted from.

use std::net::SocketAddr;
use std::time::Duration;

use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::congestion::Congestion;

/// How long accepting pauses when the system gives no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An address can't be listened on.
#[derive(Debug, Error)]
#[error("{address} can't be listened on: {}", explain(.source))]
pub struct BindError {
    /// Which.
    pub address: SocketAddr,
    /// What the system says.
    pub source: std::io::Error,
}

fn explain(error: &std::io::Error) -> String {
    let hint = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            "; another program has the port: end it, or choose another with --listen or http.listen"
        }
        std::io::ErrorKind::AddrNotAvailable => "; no interface has this address: see http.listen",
        std::io::ErrorKind::PermissionDenied => "; ports below 1024 are for root: see http.listen",
        _ => "",
    };
    format!("{error}{hint}")
}

/// Sockets that are bound, and wait.
#[derive(Debug)]
pub struct Listeners(Vec<Listener>);

#[derive(Debug)]
struct Listener {
    socket: TcpListener,
    congestion: Congestion,
}

impl Listeners {
    /// Binds the addresses. One that fails is told in the log as long as another one works.
    pub async fn bind(addresses: &[SocketAddr]) -> Result<Self, BindError> {
        let (mut bound, mut failed) = (Vec::new(), None);
        for &address in addresses {
            match bind_one(address).await {
                Ok(listener) => bound.push(listener),
                Err(source) => {
                    let error = BindError { address, source };
                    if let Some(earlier) = failed.replace(error) {
                        tracing::error!("{earlier}");
                    }
                }
            }
        }
        match failed {
            Some(error) if bound.is_empty() => Err(error),
            Some(error) => {
                tracing::error!("{error}");
                Ok(Self(bound))
            }
            None => Ok(Self(bound)),
        }
    }

    /// The addresses, with the ports that the system chose where 0 was asked for.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.0.iter().filter_map(|listener| listener.socket.local_addr().ok()).collect()
    }

    /// Accepts connections, in tasks that end with what takes them.
    pub(super) fn accept(self) -> (JoinSet<()>, mpsc::Receiver<(TcpStream, SocketAddr)>) {
        let (accepted, incoming) = mpsc::channel(16);
        let mut acceptors = JoinSet::new();
        for listener in self.0 {
            acceptors.spawn(accept(listener, accepted.clone()));
        }
        (acceptors, incoming)
    }
}

async fn bind_one(address: SocketAddr) -> std::io::Result<Listener> {
    let socket = match TcpListener::bind(address).await {
        // A kernel without IPv6: all addresses are then all IPv4 addresses.
        Err(error) if address.ip() == std::net::Ipv6Addr::UNSPECIFIED && is_no_ipv6(&error) => {
            TcpListener::bind(SocketAddr::from(([0u8; 4], address.port()))).await
        }
        done => done,
    }?;
    // At once: who asks while the rest starts waits in the queue of this socket.
    let congestion = Congestion::of(&socket);
    Ok(Listener { socket, congestion })
}

fn is_no_ipv6(error: &std::io::Error) -> bool {
    let code = rustix::io::Errno::from_io_error(error);
    matches!(code, Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL))
}

/// Gives on what is accepted, until nobody takes it any more.
async fn accept(listener: Listener, accepted: mpsc::Sender<(TcpStream, SocketAddr)>) {
    let mut has_failed = false;
    loop {
        match listener.socket.accept().await {
            Ok((socket, address)) => {
                has_failed = false;
                listener.congestion.choose(&socket, address.ip());
                if accepted.send((socket, address)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                if !wants_for_something(&error) {
                    tracing::debug!(%error, "a connection can't be accepted");
                } else if !std::mem::replace(&mut has_failed, true) {
                    // Once, however long it lasts.
                    tracing::warn!(%error, "no connection can be accepted: is the limit of open files low (LimitNOFILE)?");
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether the system has not enough of something for any connection; other errors are of one.
fn wants_for_something(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let wants = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| wants.contains(&errno))
}
