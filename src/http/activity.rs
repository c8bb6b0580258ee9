//! What moves on a connection, so that one that stands still can be told from one that is busy.
//!
//! hyper knows when a request begins; the socket knows when bytes move. Put together they give the three waits
//! that need a bound: headers that do not come to their end, a client that does not read, and nobody asking.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Limits;
use crate::metrics::Refusal;

/// What is known of a connection's movements. Times are milliseconds since it began, plus one; 0 is "not so".
#[derive(Debug)]
pub(super) struct Activity {
    since: Instant,
    moved: AtomicU64,
    head_begun: AtomicU64,
    write_blocked: AtomicU64,
    in_flight: AtomicBool,
}

impl Activity {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            moved: AtomicU64::new(1),
            head_begun: AtomicU64::new(0),
            write_blocked: AtomicU64::new(0),
            in_flight: AtomicBool::new(false),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    /// A request's headers are complete.
    pub(super) fn request_began(&self) {
        self.in_flight.store(true, Ordering::Relaxed);
        self.head_begun.store(0, Ordering::Relaxed);
    }

    /// The last of an answer was handed over.
    pub(super) fn request_ended(&self) {
        self.moved.store(self.now(), Ordering::Relaxed);
        self.in_flight.store(false, Ordering::Relaxed);
    }

    /// Whether the connection has stood still for too long, and why.
    pub(super) fn overdue(&self, limits: &Limits) -> Option<Refusal> {
        let now = self.now();
        let longer = |since: &AtomicU64, limit: Duration| {
            let since = since.load(Ordering::Relaxed);
            since != 0 && u128::from(now.saturating_sub(since)) > limit.as_millis()
        };
        if longer(&self.write_blocked, limits.idle_time) {
            return Some(Refusal::IdleTime);
        }
        if self.in_flight.load(Ordering::Relaxed) {
            // The client waits for us: not its fault.
            return None;
        }
        if longer(&self.head_begun, limits.header_time) {
            return Some(Refusal::HeaderTime);
        }
        longer(&self.moved, limits.idle_time).then_some(Refusal::IdleTime)
    }

    fn has_read(&self) {
        if !self.in_flight.load(Ordering::Relaxed) {
            let now = self.now();
            self.moved.store(now, Ordering::Relaxed);
            // The clock of the headers starts with their first byte.
            let _ = self.head_begun.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    fn has_tried_to_write(&self, blocked: bool) {
        if !blocked {
            // Also behind the end of an answer, while its last bytes go out.
            self.moved.store(self.now(), Ordering::Relaxed);
            self.write_blocked.store(0, Ordering::Relaxed);
        } else if self.write_blocked.load(Ordering::Relaxed) == 0 {
            self.write_blocked.store(self.now(), Ordering::Relaxed);
        }
    }
}

/// A socket whose movements are noted.
#[derive(Debug)]
pub(super) struct Watched<S> {
    socket: S,
    activity: Arc<Activity>,
}

impl<S> Watched<S> {
    pub(super) fn new(socket: S, activity: Arc<Activity>) -> Self {
        Self { socket, activity }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let done = ready!(Pin::new(&mut self.socket).poll_read(context, buffer));
        if buffer.filled().len() > before {
            self.activity.has_read();
        }
        Poll::Ready(done)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let done = Pin::new(&mut self.socket).poll_write(context, bytes);
        self.activity.has_tried_to_write(done.is_pending());
        done
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let done = Pin::new(&mut self.socket).poll_write_vectored(context, slices);
        self.activity.has_tried_to_write(done.is_pending());
        done
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
