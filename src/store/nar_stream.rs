//! A NAR as a stream of chunks, from a copy or from its tree, with the lease that keeps its path.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::BoxStream;

use super::Store;
use super::file_span::FileSpan;
use super::known::KnownPath;
use super::leases::Lease;
use super::nar_chunks::NarChunks;
use super::nar_copy::{CopyReader, Gone};
use super::nar_read_error::NarReadError;
use super::nar_reader::NarReader;
use crate::nix::StorePathHash;
use crate::nix::layout::NarLayout;

/// The bytes of a NAR, or of a range of it. Dropping it midway frees everything but a copy that is being made: that goes on
/// for some seconds, for whoever comes next.
pub struct NarStream {
    source: Source,
    /// What is still to come.
    range: Range<u64>,
    real: PathBuf,
    layout: Arc<NarLayout>,
    /// Told when the path turns out not to be what was remembered of it.
    store: Store,
    hash: StorePathHash,
    _lease: Option<Lease>,
}

enum Source {
    /// With its chunks from where the stream is, once they were asked for.
    Copy(CopyReader, Option<BoxStream<'static, Result<Bytes, Gone>>>),
    Tree(NarChunks),
    Ended,
}

impl NarStream {
    pub(super) fn new(
        store: Store,
        known: &KnownPath,
        layout: Arc<NarLayout>,
        range: Range<u64>,
        lease: Option<Lease>,
        copy: Option<CopyReader>,
    ) -> Self {
        let (real, hash) = (known.real.clone(), known.info.hash());
        let mut stream = Self { source: Source::Ended, range, real, layout, store, hash, _lease: lease };
        stream.source = match copy {
            Some(copy) => Source::Copy(copy, None),
            None => Source::Tree(stream.tree_chunks()),
        };
        stream
    }

    /// Bytes that are still to come.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// The next bytes, if they need not be read here: then they have come, for the stream. `None`: the next chunk has them.
    pub fn span(&mut self) -> Option<FileSpan> {
        let span = match &mut self.source {
            Source::Ended => None,
            Source::Tree(chunks) => chunks.span(),
            Source::Copy(copy, chunks) => {
                let span = copy.span(&self.range);
                // They would go on behind it.
                chunks.take_if(|_| span.is_some());
                span
            }
        }?;
        self.range.start += span.len() as u64;
        Some(span)
    }

    /// Forgets what is remembered of the path, as the stream itself does when it can't be read.
    pub fn forgetter(&self) -> impl Fn() + Send + Sync + use<> {
        let (store, hash) = (self.store.clone(), self.hash);
        move || store.forget(&hash)
    }

    /// What is still to come, from the tree.
    fn tree_chunks(&self) -> NarChunks {
        let reader = NarReader::new(self.real.clone(), Arc::clone(&self.layout), self.range.clone());
        NarChunks::new(reader, self.store.0.pool.clone())
    }
}

impl Stream for NarStream {
    type Item = Result<Bytes, NarReadError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.remaining() == 0 {
            self.source = Source::Ended;
        }
        let this = &mut *self;
        loop {
            let next = match &mut this.source {
                Source::Ended => return Poll::Ready(None),
                Source::Tree(chunks) => ready!(chunks.poll_next(context)),
                Source::Copy(copy, chunks) => {
                    let (range, pool) = (&this.range, &this.store.0.pool);
                    let chunks = chunks.get_or_insert_with(|| copy.chunks(range.clone(), pool.clone()));
                    match ready!(chunks.as_mut().poll_next(context)) {
                        Some(Ok(chunk)) => Some(Ok(chunk)),
                        // The tree has the same bytes.
                        Some(Err(Gone)) | None => {
                            this.source = Source::Tree(this.tree_chunks());
                            continue;
                        }
                    }
                }
            };
            match &next {
                Some(Ok(chunk)) => this.range.start += chunk.len() as u64,
                Some(Err(_)) => {
                    this.store.forget(&this.hash);
                    this.source = Source::Ended;
                }
                None => this.source = Source::Ended,
            }
            return Poll::Ready(next);
        }
    }
}

impl fmt::Debug for NarStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NarStream")
            .field("real", &self.real)
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}
