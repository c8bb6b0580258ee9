//! Buffers for chunks of NARs, read here or received from peers, and places for them: one pool for all streams.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of a chunk: large enough that the system calls do not count, small enough for a processor's cache.
pub(super) const CHUNK: usize = 256 * 1024;
/// Bytes of a chunk that need not be as long: no other thread has to be woken for it, or somebody waits for the first bytes. A client
/// that stops reading holds some.
pub(super) const SHORT_CHUNK: usize = 64 * 1024;
/// Buffers that are kept for the next chunk; fresh ones cost half as much again.
const POOL: usize = 32;
/// Chunks that all streams together may read ahead, or have read, and not sent: a client that stops reading keeps its. While one is read
/// it takes a thread and two descriptors.
const PLACES: usize = 16;

/// Buffers of two sizes that are used again. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct BufferPool {
    buffers: Arc<Mutex<Vec<Box<[u8]>>>>,
    short: Arc<Mutex<Vec<Box<[u8]>>>>,
    places: Arc<Semaphore>,
}

impl Default for BufferPool {
    fn default() -> Self {
        let places = Arc::new(Semaphore::new(PLACES));
        Self { buffers: Arc::default(), short: Arc::default(), places }
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
        let pooled = match buffer.len() {
            CHUNK => &self.buffers,
            SHORT_CHUNK => &self.short,
            _ => return,
        };
        let mut buffers = pooled.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < POOL {
            buffers.push(buffer);
        }
    }

    /// Of [`CHUNK`] bytes if it has a place, else of [`SHORT_CHUNK`]: those who have none are too many for long ones.
    pub(super) fn take_in(&self, place: Option<&OwnedSemaphorePermit>) -> Box<[u8]> {
        if place.is_some() { self.take() } else { self.take_short() }
    }

    /// The first `len` bytes of a buffer, which comes back to the pool, and its place with it, when the last view of them is dropped.
    pub(super) fn share(&self, buffer: Box<[u8]>, len: usize, place: Option<OwnedSemaphorePermit>) -> Bytes {
        Buffer { buffer, len, pool: self.clone(), _place: place }.into_bytes()
    }

    /// An empty buffer for bytes that come piece by piece, `left` of them at most; a `long` one if there may be as many.
    #[must_use]
    pub fn empty(&self, left: u64, long: bool) -> Buffer {
        let buffer = match usize::try_from(left).unwrap_or(usize::MAX) {
            left @ ..SHORT_CHUNK => vec![0; left].into_boxed_slice(),
            CHUNK.. if long => self.take(),
            _ => self.take_short(),
        };
        Buffer { buffer, len: 0, pool: self.clone(), _place: None }
    }

    /// A place for one more chunk, if there is one.
    pub(super) fn place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// A place for what a stream reads besides its next chunk: a few streams shall not take them all.
    pub(super) fn spare_place(&self) -> Option<OwnedSemaphorePermit> {
        self.place().filter(|_| self.places.available_permits() >= PLACES / 2)
    }

    #[cfg(test)]
    pub(super) fn places(&self) -> usize {
        self.places.available_permits()
    }
}

/// A buffer that is being filled, and comes back to the pool when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    buffer: Box<[u8]>,
    len: usize,
    pool: BufferPool,
    _place: Option<OwnedSemaphorePermit>,
}

impl Buffer {
    /// Takes as much from the beginning of `bytes` as there is room for. Returns how much, in bytes.
    pub fn take_from(&mut self, bytes: &mut Bytes) -> usize {
        let room = &mut self.buffer[self.len..];
        let part = bytes.split_to(bytes.len().min(room.len()));
        room[..part.len()].copy_from_slice(&part);
        self.len += part.len();
        part.len()
    }

    /// Whether there is no room for more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len == self.buffer.len()
    }

    /// What it was filled with.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_no_longer_than_what_is_left_and_comes_back_when_all_views_are_gone() {
        let pool = BufferPool::default();
        let kept = || (pool.short.lock().unwrap().len(), pool.buffers.lock().unwrap().len());
        for (left, long, len) in [
            (0, true, 0),
            (5, true, 5),
            (SHORT_CHUNK - 1, false, SHORT_CHUNK - 1),
            (SHORT_CHUNK, false, SHORT_CHUNK),
            (CHUNK, false, SHORT_CHUNK),
            (CHUNK - 1, true, SHORT_CHUNK),
            (CHUNK, true, CHUNK),
            (10 * CHUNK, true, CHUNK),
        ] {
            let (mut buffer, mut bytes) = (pool.empty(left as u64, long), Bytes::from(vec![7; len + 3]));
            assert_eq!(buffer.take_from(&mut bytes.split_to(len / 2)), len / 2);
            assert!(len == 0 || !buffer.is_full());
            assert_eq!(buffer.take_from(&mut bytes), len - len / 2, "{left}, {long}");
            assert!(buffer.is_full() && bytes.len() == 3);
            let before = kept();
            let whole = buffer.into_bytes();
            let view = whole.slice(len / 2..);
            drop(whole);
            assert!(view.iter().all(|byte| *byte == 7) && kept() == before);
            drop(view);
        }
        assert_eq!(kept(), (1, 1));
    }
}
