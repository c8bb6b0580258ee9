//! The body of any answer: its bytes are counted, and its end is noted.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::activity::Activity;
use crate::metrics::{HttpMetrics, Route};

#[derive(Debug)]
pub(super) struct CountedBody {
    body: Body,
    route: Route,
    sent: u64,
    metrics: Arc<HttpMetrics>,
    activity: Arc<Activity>,
}

impl CountedBody {
    pub(super) fn new(body: Body, route: Route, metrics: Arc<HttpMetrics>, activity: Arc<Activity>) -> Self {
        Self { body, route, sent: 0, metrics, activity }
    }
}

impl http_body::Body for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame {
            self.sent += frame.data_ref().map_or(0, |chunk| chunk.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for CountedBody {
    fn drop(&mut self) {
        self.metrics.bytes(self.route, self.sent);
        self.activity.request_ended();
    }
}
