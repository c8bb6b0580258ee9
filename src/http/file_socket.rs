//! Files that the kernel sends by itself: `sendfile` under hyper, which knows of memory alone.
//!
//! In the place of the contents a body gives hyper a piece of memory that nobody reads. The socket knows that piece by its
//! address, and has the kernel send, from the queue of its connection, the part of a file that the piece stands for. The order
//! is the same on both sides: whatever a body gives is written in turn, or the connection ends.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::sent_nar::SentNar;
use crate::resolve::FileSpan;

/// Stands for parts of files. It is never touched, so that it takes addresses and no memory.
static STAND_IN: LazyLock<Bytes> = LazyLock::new(|| vec![0; FileSpan::LONGEST].into());

/// What is to be sent over one connection. Cheap to clone: all clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct FileQueue(Arc<Mutex<Queue>>);

type Queue = VecDeque<(FileSpan, Arc<SentNar>)>;

impl FileQueue {
    /// Takes a part of a file of that NAR, and gives what stands for it. That has to be the next that is written to the connection.
    pub(super) fn push(&self, span: FileSpan, nar: &Arc<SentNar>) -> Bytes {
        let stand_in = STAND_IN.slice(..span.len());
        self.queue().push_back((span, Arc::clone(nar)));
        stand_in
    }

    fn send(&self, socket: &TcpStream, len: usize) -> io::Result<usize> {
        let mut queue = self.queue();
        let (span, _) = queue.front_mut().ok_or_else(|| io::Error::other("there is no file to send"))?;
        let sent = span.send(socket, len)?;
        if span.is_empty() {
            queue.pop_front();
        }
        Ok(sent)
    }

    /// The NAR whose part comes next can't be sent on.
    fn cut(&self, error: &io::Error) {
        let cut = self.queue().pop_front();
        match cut {
            Some((_, nar)) => nar.cut(error),
            None => tracing::error!(%error, "a NAR was cut short, and nobody knows which"),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this stands for a part of a file.
fn stands_in(slice: &[u8]) -> bool {
    let stand_in = STAND_IN.as_ptr_range();
    !slice.is_empty() && stand_in.contains(&slice.as_ptr())
}

/// Whether an error says that the client is gone, and nothing of the file.
fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, HostUnreachable, NetworkDown, NetworkUnreachable,
        NotConnected, TimedOut,
    };
    matches!(
        error.kind(),
        BrokenPipe
            | ConnectionAborted
            | ConnectionReset
            | HostUnreachable
            | NetworkDown
            | NetworkUnreachable
            | NotConnected
            | TimedOut
    )
}

/// A socket that sends files.
#[derive(Debug)]
pub(super) struct FileSocket {
    socket: TcpStream,
    files: FileQueue,
}

impl FileSocket {
    pub(super) fn new(socket: TcpStream, files: FileQueue) -> Self {
        Self { socket, files }
    }

    /// Sends what a file follows at once: with it, and not in a segment of its own that wakes up the client.
    fn poll_send_before_file(
        &self,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_write_ready(context))?;
            let sent = self.socket.try_io(Interest::WRITABLE, || {
                let flags = SendFlags::MORE | SendFlags::NOSIGNAL;
                Ok(sendmsg(&self.socket, slices, &mut SendAncillaryBuffer::default(), flags)?)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Poll::Ready(done),
            }
        }
    }

    fn poll_send(&self, context: &mut Context<'_>, len: usize) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_write_ready(context))?;
            let sent = self.socket.try_io(Interest::WRITABLE, || self.files.send(&self.socket, len));
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if !is_of_the_client(&error) => {
                    self.files.cut(&error);
                    return Poll::Ready(Err(error));
                }
                done => return Poll::Ready(done),
            }
        }
    }
}

impl AsyncRead for FileSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for FileSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if stands_in(bytes) {
            return self.poll_send(context, bytes.len());
        }
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match slices.iter().position(|slice| stands_in(slice)) {
            Some(0) => self.poll_send(context, slices[0].len()),
            Some(first) => self.poll_send_before_file(context, &slices[..first]),
            None => Pin::new(&mut self.socket).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        // hyper copies what it is given if not, and would then read what stands for files.
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
