//! Listeners and connections: bound, accepted, watched, drained.
//!
//! Each connection is a task that belongs to the server; none outlives its shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::activity::{Activity, Watched};
use super::app::App;
use super::compressors::Compressors;
use super::file_socket::FileSocket;
use super::gate::{Admitted, Gate};
use super::{Limits, Options};
use crate::metrics::Metrics;
use crate::resolve::Resolver;

/// How long accepting pauses when the system gives no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const TIDY_PERIOD: Duration = Duration::from_secs(60);
/// How much of an answer may wait for the socket before more of it is asked for, in bytes: half of a NAR's chunk. With less,
/// the next chunk comes too late for a client that reads.
const BUFFERED: usize = 128 * 1024;

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
pub struct Listeners(Vec<TcpListener>);

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
        self.0.iter().filter_map(|listener| listener.local_addr().ok()).collect()
    }
}

async fn bind_one(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        // A kernel without IPv6: all addresses are then all IPv4 addresses.
        Err(error) if address.ip() == std::net::Ipv6Addr::UNSPECIFIED && is_no_ipv6(&error) => {
            TcpListener::bind(SocketAddr::from(([0u8; 4], address.port()))).await
        }
        done => done,
    }
}

fn is_no_ipv6(error: &std::io::Error) -> bool {
    let code = rustix::io::Errno::from_io_error(error);
    matches!(code, Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL))
}

/// What serves; runs until it is shut down.
#[derive(Debug)]
pub struct Server {
    app: Arc<App>,
    gate: Arc<Gate>,
    limits: Arc<Limits>,
    drain_time: Duration,
    metrics: Metrics,
}

impl Server {
    /// Puts the parts together. Nothing is served yet.
    #[must_use]
    pub fn new(resolver: Resolver, options: &Options, limits: &Limits, metrics: Metrics) -> Self {
        let compressors = Compressors::new(limits.compressors());
        Self {
            app: Arc::new(App::new(resolver, options, compressors, metrics.clone())),
            gate: Arc::new(Gate::new(options, limits)),
            limits: Arc::new(limits.clone()),
            drain_time: options.drain_time,
            metrics,
        }
    }

    /// Serves until `stop` turns true, then lets answers in flight come to their end within `http.drain_time`.
    pub async fn run(self, listeners: Listeners, stop: watch::Receiver<bool>) {
        let (accepted, mut incoming) = mpsc::channel(16);
        let mut acceptors = JoinSet::new();
        for listener in listeners.0 {
            acceptors.spawn(accept(listener, accepted.clone()));
        }
        drop(accepted);
        let mut connections = JoinSet::new();
        let mut tidy = interval(TIDY_PERIOD);
        tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stopping = stop.clone();
        loop {
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => break,
                Some((socket, address)) = incoming.recv() => {
                    if let Some(connection) = self.connection(socket, address, stop.clone()) {
                        connections.spawn(connection);
                    }
                }
                Some(_) = connections.join_next() => {}
                _ = tidy.tick() => self.gate.tidy(),
            }
        }
        acceptors.shutdown().await;
        let drained = timeout(self.drain_time, async { while connections.join_next().await.is_some() {} });
        if drained.await.is_err() {
            let cut = connections.len();
            let drain_time = self.drain_time;
            tracing::warn!(connections = cut, ?drain_time, "answers were cut: http.drain_time is over");
            connections.shutdown().await;
        }
    }

    fn connection(
        &self,
        socket: TcpStream,
        address: SocketAddr,
        stop: watch::Receiver<bool>,
    ) -> Option<impl Future<Output = ()> + use<>> {
        let client = match self.gate.admit(address.ip()) {
            Ok(client) => client,
            Err(reason) => {
                self.metrics.http.closed(reason);
                tracing::debug!(client = %address.ip(), ?reason, "a connection was refused");
                return None;
            }
        };
        // Without it the last bytes of an answer may wait for an acknowledgement.
        let _ = socket.set_nodelay(true);
        let (app, limits, metrics) = (Arc::clone(&self.app), Arc::clone(&self.limits), self.metrics.clone());
        Some(async move {
            metrics.http.connections.inc();
            serve(socket, client, app, &limits, &metrics, stop).await;
            metrics.http.connections.dec();
        })
    }
}

async fn accept(listener: TcpListener, accepted: mpsc::Sender<(TcpStream, SocketAddr)>) {
    let mut has_failed = false;
    loop {
        match listener.accept().await {
            Ok(connection) => {
                has_failed = false;
                if accepted.send(connection).await.is_err() {
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

async fn serve(
    socket: TcpStream,
    client: Admitted,
    app: Arc<App>,
    limits: &Limits,
    metrics: &Metrics,
    mut stop: watch::Receiver<bool>,
) {
    let activity = Arc::new(Activity::new());
    let socket = FileSocket::new(socket, client.files.clone());
    let io = TokioIo::new(Watched::new(socket, Arc::clone(&activity)));
    let (client, noted) = (Arc::new(client), Arc::clone(&activity));
    let service = service_fn(move |request| {
        let (app, client, activity) = (Arc::clone(&app), Arc::clone(&client), Arc::clone(&noted));
        async move { Ok::<_, std::convert::Infallible>(app.answer(request, &client, activity).await) }
    });
    let connection = protocol(limits).serve_connection(io, service);
    tokio::pin!(connection);
    let shortest = limits.header_time.min(limits.idle_time);
    let mut watchdog = interval((shortest / 4).clamp(Duration::from_millis(25), Duration::from_secs(1)));
    watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = false;
    loop {
        tokio::select! {
            done = connection.as_mut() => {
                if let Err(error) = done {
                    tracing::debug!(%error, "a connection ended");
                }
                return;
            }
            _ = watchdog.tick() => if let Some(reason) = activity.overdue(limits) {
                metrics.http.closed(reason);
                return;
            },
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

fn protocol(limits: &Limits) -> http1::Builder {
    let header_size = usize::try_from(limits.header_size.as_u64()).unwrap_or(usize::MAX);
    let mut http = http1::Builder::new();
    http.max_header_size(header_size).header_read_timeout(None).half_close(false);
    // hyper's own is 408 KiB. A client that stops reading holds all of it, and the chunk that was asked for last.
    http.max_buf_size(header_size.max(BUFFERED));
    http
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::body::Body;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_client_that_stops_reading_holds_one_chunk() {
        const CHUNK: usize = 256 * 1024;
        let (client, server) = tokio::io::duplex(CHUNK / 4);
        let given = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&given);
        let service = service_fn(move |_| {
            let counted = Arc::clone(&counted);
            let chunks = futures_util::stream::repeat_with(move || {
                counted.fetch_add(1, Ordering::Relaxed);
                Ok::<_, std::convert::Infallible>(vec![0; CHUNK])
            });
            async {
                Ok::<_, std::convert::Infallible>(axum::response::Response::new(Body::from_stream(chunks)))
            }
        });
        let limits = Limits::default();
        let connection = tokio::spawn(protocol(&limits).serve_connection(TokioIo::new(server), service));
        let (mut reading, mut writing) = tokio::io::split(client);
        writing.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").await.unwrap();
        let mut head = [0; 12];
        reading.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200");
        // One thread: when this goes on, the connection waits for the client.
        tokio::task::yield_now().await;
        assert_eq!(given.load(Ordering::Relaxed), 1);
        connection.abort();
    }
}
