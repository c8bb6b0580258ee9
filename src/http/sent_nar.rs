//! Which local NAR is being sent, and what becomes of it when it can't be sent to its end.

use std::fmt::Display;
use std::sync::Arc;

use tracing::Span;

use crate::metrics::HttpMetrics;
use crate::nix::StorePath;
use crate::resolve::NarStream;

/// A NAR that is being sent, and the request for it.
pub(super) struct SentNar {
    path: StorePath,
    /// The request that is answered.
    span: Span,
    metrics: Arc<HttpMetrics>,
    forget: Box<dyn Fn() + Send + Sync>,
}

impl SentNar {
    /// Of the request that is being answered.
    pub(super) fn new(path: StorePath, stream: &NarStream, metrics: Arc<HttpMetrics>) -> Self {
        Self { path, span: Span::current(), metrics, forget: Box::new(stream.forgetter()) }
    }

    /// It can't be sent on, and the connection ends. Whoever asks next is told what the store says then.
    pub(super) fn cut(&self, error: &dyn Display) {
        (self.forget)();
        self.metrics.nar_cuts.inc();
        let _entered = self.span.enter();
        tracing::warn!(store_path = %self.path, %error, "a NAR was cut short; the client was told by a closed connection");
    }
}

impl std::fmt::Debug for SentNar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SentNar").field("path", &self.path).finish_non_exhaustive()
    }
}
