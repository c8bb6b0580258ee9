//! Buffers for chunks of NARs, and places to read ahead: one pool for all streams.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a chunk: large enough that the system calls do not count, small enough for a processor's cache.
pub(super) const CHUNK: usize = 256 * 1024;
/// Bytes of a chunk that no other thread has to be woken for, which need not be as long: a client that stops reading holds some.
pub(super) const SHORT_CHUNK: usize = 64 * 1024;
/// Buffers that are kept for the next chunk; fresh ones cost half as much again.
const POOL: usize = 32;
/// Chunks that all streams together may read, or have read and not given out, besides the one that each may have under way.
/// Each takes a buffer, and while it is read a thread and two descriptors.
const READ_AHEAD: usize = 32;

/// Buffers of two sizes that are used again.
#[derive(Clone, Debug)]
pub(super) struct BufferPool {
    buffers: Arc<Mutex<Vec<Box<[u8]>>>>,
    short: Arc<Mutex<Vec<Box<[u8]>>>>,
    ahead: Arc<Semaphore>,
}

impl Default for BufferPool {
    fn default() -> Self {
        let ahead = Arc::new(Semaphore::new(READ_AHEAD));
        Self { buffers: Arc::default(), short: Arc::default(), ahead }
    }
}

impl BufferPool {
    /// Of [`CHUNK`] bytes.
    pub(super) fn take(&self) -> Box<[u8]> {
        Self::one_of(&self.buffers, CHUNK)
    }

    /// Of [`SHORT_CHUNK`] bytes.
    pub(super) fn take_short(&self) -> Box<[u8]> {
        Self::one_of(&self.short, SHORT_CHUNK)
    }

    fn one_of(pooled: &Mutex<Vec<Box<[u8]>>>, len: usize) -> Box<[u8]> {
        let pooled = pooled.lock().unwrap_or_else(PoisonError::into_inner).pop();
        pooled.unwrap_or_else(|| vec![0; len].into_boxed_slice())
    }

    pub(super) fn give_back(&self, buffer: Box<[u8]>) {
        let pooled = if buffer.len() == CHUNK { &self.buffers } else { &self.short };
        let mut buffers = pooled.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < POOL {
            buffers.push(buffer);
        }
    }

    /// The first `len` bytes of a buffer, which comes back to the pool when the last view of them is dropped.
    pub(super) fn share(&self, buffer: Box<[u8]>, len: usize) -> Bytes {
        Bytes::from_owner(Pooled { buffer, len, pool: self.clone() })
    }

    /// A place to read one more chunk ahead, if there is one.
    pub(super) fn place_ahead(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.ahead).try_acquire_owned().ok()
    }

    #[cfg(test)]
    pub(super) fn places_ahead(&self) -> usize {
        self.ahead.available_permits()
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
