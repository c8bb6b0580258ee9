//! A NAR as the body of an answer. A failure midway cuts the connection: the length was announced, and the client sees
//! that bytes are missing.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::Stream as _;
use http_body::{Body, Frame, SizeHint};

use super::file_socket::FileQueue;
use super::sent_nar::SentNar;
use crate::metrics::HttpMetrics;
use crate::nix::StorePath;
use crate::resolve::{NarReadError, NarStream};

#[derive(Debug)]
pub(super) struct NarBody {
    stream: NarStream,
    nar: Arc<SentNar>,
    files: FileQueue,
}

impl NarBody {
    /// To be written to the connection that has this queue, and read by nobody else.
    pub(super) fn new(
        stream: NarStream,
        path: StorePath,
        metrics: Arc<HttpMetrics>,
        files: FileQueue,
    ) -> Self {
        let nar = Arc::new(SentNar::new(path, &stream, metrics));
        Self { stream, nar, files }
    }
}

impl Body for NarBody {
    type Data = Bytes;
    type Error = NarReadError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, NarReadError>>> {
        if let Some(span) = self.stream.span() {
            return Poll::Ready(Some(Ok(Frame::data(self.files.push(span, &self.nar)))));
        }
        match ready!(Pin::new(&mut self.stream).poll_next(context)) {
            None => Poll::Ready(None),
            Some(Ok(chunk)) => Poll::Ready(Some(Ok(Frame::data(chunk)))),
            Some(Err(error)) => {
                self.nar.cut(&error);
                Poll::Ready(Some(Err(error)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.remaining() == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.stream.remaining())
    }
}
