//! A NAR as a stream of chunks, with the lease that keeps its path.
//!
//! Contents that are in memory are read where the stream is polled; everything else (opening files, the disk) is done
//! by a blocking task a chunk at a time, so that a slow reader holds a buffer or two and never a thread.

use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use tokio::task::{JoinHandle, spawn_blocking};

use super::Store;
use super::known::KnownPath;
use super::leases::Lease;
use super::nar_reader::{NarReadError, NarReader};
use crate::nix::StorePathHash;
use crate::nix::layout::NarLayout;

/// Bytes of a chunk: large enough that the system calls do not count, small enough for a processor's cache.
const CHUNK: usize = 256 * 1024;
/// Buffers that are kept for the next chunk; fresh ones cost half as much again.
const POOL: usize = 32;

/// The bytes of a NAR, or of a range of it. Dropping it midway frees everything.
#[derive(Debug)]
pub struct NarStream {
    state: State,
    remaining: u64,
    pool: BufferPool,
    /// Told when the path turns out not to be what was remembered of it.
    store: Store,
    hash: StorePathHash,
    _lease: Option<Lease>,
}

#[derive(Debug)]
enum State {
    Idle(Box<NarReader>),
    Filling(JoinHandle<(Box<NarReader>, Result<Bytes, NarReadError>)>),
    Ended,
}

impl NarStream {
    pub(super) fn new(
        store: Store,
        known: &KnownPath,
        layout: Arc<NarLayout>,
        range: Range<u64>,
        lease: Option<Lease>,
    ) -> Self {
        let pool = store.0.pool.clone();
        let reader = Box::new(NarReader::new(known.real.clone(), layout, range));
        let (remaining, hash) = (reader.remaining(), known.info.hash());
        Self { state: State::Idle(reader), remaining, pool, store, hash, _lease: lease }
    }

    /// Bytes that are still to come.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    fn fail(&self, error: NarReadError) -> Poll<Option<Result<Bytes, NarReadError>>> {
        self.store.forget(&self.hash);
        Poll::Ready(Some(Err(error)))
    }

    fn fill_in_background(&mut self, mut reader: Box<NarReader>) {
        let pool = self.pool.clone();
        self.state = State::Filling(spawn_blocking(move || {
            let mut buffer = pool.take();
            let filled = reader.fill(&mut buffer);
            let chunk = filled.map(|filled| pool.share(buffer, filled));
            (reader, chunk)
        }));
    }
}

impl Stream for NarStream {
    type Item = Result<Bytes, NarReadError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match std::mem::replace(&mut self.state, State::Ended) {
                State::Ended => return Poll::Ready(None),
                State::Idle(reader) if self.remaining == 0 => drop(reader),
                State::Idle(mut reader) => {
                    if reader.is_inside_file(CHUNK as u64) {
                        let mut buffer = self.pool.take();
                        match reader.fill_cached(&mut buffer) {
                            Ok(Some(filled)) => {
                                self.state = State::Idle(reader);
                                self.remaining -= filled as u64;
                                return Poll::Ready(Some(Ok(self.pool.share(buffer, filled))));
                            }
                            Ok(None) => self.pool.give_back(buffer),
                            Err(error) => return self.fail(error),
                        }
                    }
                    self.fill_in_background(reader);
                }
                State::Filling(mut task) => {
                    let Poll::Ready(done) = Pin::new(&mut task).poll(context) else {
                        self.state = State::Filling(task);
                        return Poll::Pending;
                    };
                    let Ok((reader, chunk)) = done else {
                        return self.fail(NarReadError::Stopped);
                    };
                    match chunk {
                        Ok(chunk) => {
                            self.remaining -= chunk.len() as u64;
                            if self.remaining > 0 && !reader.is_inside_file(CHUNK as u64) {
                                // The next chunk is filled while this one is sent.
                                self.fill_in_background(reader);
                            } else {
                                self.state = State::Idle(reader);
                            }
                            return Poll::Ready(Some(Ok(chunk)));
                        }
                        Err(error) => return self.fail(error),
                    }
                }
            }
        }
    }
}

/// Buffers of one size that are used again.
#[derive(Clone, Debug, Default)]
pub(super) struct BufferPool(Arc<Mutex<Vec<Box<[u8]>>>>);

impl BufferPool {
    fn take(&self) -> Box<[u8]> {
        let pooled = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        pooled.unwrap_or_else(|| vec![0; CHUNK].into_boxed_slice())
    }

    fn give_back(&self, buffer: Box<[u8]>) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < POOL {
            pool.push(buffer);
        }
    }

    /// The first `len` bytes of a buffer, which comes back to the pool when the last view of them is dropped.
    fn share(&self, buffer: Box<[u8]>, len: usize) -> Bytes {
        Bytes::from_owner(Pooled { buffer, len, pool: self.clone() })
    }
}

struct Pooled {
    buffer: Box<[u8]>,
    len: usize,
    pool: BufferPool,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.buffer));
    }
}
