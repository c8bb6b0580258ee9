//! Connections: taken in, watched, drained.
//!
//! Each connection is a task that belongs to the server; none outlives its shutdown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::activity::{Activity, Watched};
use super::app::App;
use super::compressors::Compressors;
use super::file_socket::FileSocket;
use super::gate::{Admitted, Gate};
use super::listeners::Listeners;
use super::{Limits, Options};
use crate::metrics::Metrics;
use crate::resolve::Resolver;

const TIDY_PERIOD: Duration = Duration::from_secs(60);
/// How much of an answer may wait for the socket before more of it is asked for, in bytes: half of a NAR's chunk. With less,
/// the next chunk comes too late for a client that reads.
const BUFFERED: usize = 128 * 1024;

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
        let (mut acceptors, mut incoming) = listeners.accept();
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
