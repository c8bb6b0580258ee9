//! A spool: one download, and many readers that follow it while it grows, each at its own pace and offset.
//!
//! Holds what came, in memory or in a file, and knows nothing of where it comes from. The invariants: what readers get is an end
//! only after all bytes came and were declared good, so a writer that is dropped is a failure; and contents are let go only when
//! the last reader has left, so nobody ever reads from what is closed.

use std::fs::File;
use std::future::poll_fn;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, PoisonError};
#[cfg(not(test))]
use std::sync::{Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
#[cfg(test)]
use shuttle::sync::{Mutex, MutexGuard};
use thiserror::Error;

use super::budget::{Budget, Reserved};
use super::spool_state::{Keep, Piece, Progress, Reading, SpoolError, State, wake};

/// Readers did not leave in time. The contents stay until they do.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{readers} readers had not left the spool after {waited:?}")]
pub struct StillRead {
    /// How many.
    pub readers: usize,
    /// The deadline.
    pub waited: Duration,
}

/// Nobody reads a download, and nobody can come any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("nobody reads it any more")]
pub struct Deserted;

/// A download and its readers.
#[derive(Debug)]
pub(super) struct Spool {
    total: u64,
    state: Mutex<State>,
}

/// Writes a spool. Dropping it before [`SpoolWriter::finish`] is a failure for all readers.
#[derive(Debug)]
pub struct SpoolWriter {
    spool: Arc<Spool>,
}

/// Adds bytes to a spool.
#[derive(Debug)]
pub struct Appender(Arc<Spool>);

/// Reads a spool from its beginning. Dropping it leaves.
#[derive(Debug)]
pub struct SpoolReader {
    spool: Arc<Spool>,
    id: u64,
    offset: u64,
}

impl Spool {
    /// An empty spool of a download of `total` bytes, and the way to fill it.
    pub(super) fn begin(total: u64, keep: Keep, file: Option<File>, reserved: Vec<Reserved>) -> SpoolWriter {
        let state = State::new(keep, file, reserved);
        SpoolWriter { spool: Arc::new(Self { total, state: Mutex::new(state) }) }
    }

    /// A reader that begins at the beginning. `None`: it is closing, failed, or its beginning is gone.
    pub(super) fn read(self: &Arc<Self>) -> Option<SpoolReader> {
        let mut state = self.lock();
        if !state.lets_in() {
            return None;
        }
        state.readers_ever += 1;
        let id = state.readers_ever;
        state.readers.insert(id, Reading { offset: 0, waker: None });
        Some(SpoolReader { spool: Arc::clone(self), id, offset: 0 })
    }

    /// Whether a file would let more than one reader follow at their own pace.
    pub(super) fn wants_file(&self) -> bool {
        self.lock().wants_file()
    }

    /// Gives it a file, into which the writer writes what came so far and all that comes.
    pub(super) fn give_file(&self, file: File, reserved: Reserved) {
        let mut state = self.lock();
        if state.wants_file() {
            state.keep = Keep::File;
            state.file = Some(Arc::new(file));
            state.reserved.push(reserved);
            wake(&mut state.writer);
        }
    }

    /// Gives it memory for its window.
    pub(super) fn give_window(&self, reserved: Reserved) {
        self.lock().window_memory = Some(reserved);
    }

    /// How much of this budget comes free when it goes.
    pub(super) fn takes_of(&self, budget: &Arc<Budget>) -> u64 {
        self.lock().all_reserved().filter(|reserved| reserved.is_of(budget)).map(Reserved::amount).sum()
    }

    /// Whether it is of no use to anybody any more, and may go.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.lock();
        state.readers.is_empty() && !matches!(state.progress, Progress::Receiving)
    }

    /// The length of the whole in bytes, if a new reader would be let in.
    pub(super) fn joinable_len(&self) -> Option<u64> {
        self.lock().lets_in().then_some(self.total)
    }

    /// Whether somebody has read it, or begun to.
    pub(super) fn was_read(&self) -> bool {
        self.lock().readers_ever > 0
    }

    /// Lets in no new reader, waits for those inside to leave, and lets the contents go after the last.
    pub(super) async fn close(&self, within: Duration) -> Result<(), StillRead> {
        self.begin_to_close();
        if tokio::time::timeout(within, self.drained()).await.is_ok() {
            return Ok(());
        }
        Err(StillRead { readers: self.lock().readers.len(), waited: within })
    }

    /// Lets in no new reader.
    pub(super) fn begin_to_close(&self) {
        let mut state = self.lock();
        state.is_closing = true;
        wake(&mut state.writer);
        state.let_go();
    }

    /// Waits until the last reader has left.
    async fn drained(&self) {
        poll_fn(|context| {
            let mut state = self.lock();
            if state.readers.is_empty() {
                return Poll::Ready(());
            }
            state.closers.push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SpoolWriter {
    /// The length of the whole, in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.spool.total
    }

    /// How much of it may wait in memory, in bytes.
    #[must_use]
    pub fn window(&self) -> u64 {
        self.spool.lock().window_memory.as_ref().map_or(self.spool.total, Reserved::amount)
    }

    pub(super) fn spool(&self) -> &Arc<Spool> {
        &self.spool
    }

    /// Waits until more may be added.
    pub async fn room(&self) -> Result<(), Deserted> {
        poll_fn(|context| {
            let mut state = self.spool.lock();
            let is_awaited = !state.readers.is_empty() || (state.keep == Keep::All && !state.is_closing);
            if !is_awaited {
                // At once, so that nobody joins what is about to be given up.
                state.give_up();
                return Poll::Ready(Err(Deserted));
            }
            if state.keep != Keep::Window || state.has_room() {
                return Poll::Ready(Ok(()));
            }
            state.writer = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Whether [`Appender::append`] may block.
    #[must_use]
    pub fn writes_to_disk(&self) -> bool {
        self.spool.lock().keep == Keep::File
    }

    /// What adds bytes; one at a time, also from another thread.
    #[must_use]
    pub fn appender(&self) -> Appender {
        Appender(Arc::clone(&self.spool))
    }

    /// All came, and is good. Fewer bytes than announced are a failure all the same.
    pub fn finish(self) {
        let mut state = self.spool.lock();
        if state.end == self.spool.total {
            state.progress = Progress::Complete;
            state.trim();
            state.wake_readers();
            state.offer();
        }
    }

    /// No more will come.
    pub fn fail(self, why: impl std::fmt::Display) {
        let mut state = self.spool.lock();
        state.progress = Progress::Failed(why.to_string().into());
        state.wake_readers();
        state.offer();
    }
}

impl Appender {
    /// Adds the next bytes. With a file this blocks until they are written; if they can't be, it goes on without one.
    pub fn append(&self, bytes: Bytes) {
        let (file, unwritten, mut at) = {
            let mut state = self.0.lock();
            state.end += bytes.len() as u64;
            state.window.push_back(bytes);
            state.wake_readers();
            match state.file.clone().filter(|_| state.keep == Keep::File) {
                Some(file) => (file, state.unwritten(), state.on_disk),
                None => return state.trim(),
            }
        };
        let mut written = Ok(());
        for bytes in unwritten {
            written = file.write_all_at(&bytes, at);
            if written.is_err() {
                break;
            }
            at += bytes.len() as u64;
        }
        let mut state = self.0.lock();
        // Unless it was let go meanwhile.
        if state.file.is_some() {
            state.on_disk = at;
        }
        if let Err(error) = written {
            tracing::warn!(%error, "a download can't be spooled; its readers follow it in memory, as fast as the slowest");
            state.keep = Keep::Window;
        }
        state.trim();
    }
}

impl Drop for SpoolWriter {
    fn drop(&mut self) {
        self.spool.lock().give_up();
    }
}

impl SpoolReader {
    /// The length of the whole, in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.spool.total
    }

    /// Waits until the first bytes are there, or all of nothing. May be dropped midway.
    pub async fn ready(&self) -> Result<(), SpoolError> {
        poll_fn(|context| self.poll(context, |_, _| ())).await.map(|_| ())
    }

    /// The next piece; `None` after the last. May be dropped midway.
    pub async fn piece(&mut self) -> Result<Option<Piece>, SpoolError> {
        let (id, was) = (self.id, self.offset);
        let piece = poll_fn(|context| {
            self.poll(context, |state, piece| {
                let len = match &piece {
                    Piece::Bytes(bytes) => bytes.len(),
                    Piece::File(_, _, len) => *len,
                };
                if let Some(reading) = state.readers.get_mut(&id) {
                    reading.offset = was + len as u64;
                }
                state.trim();
                wake(&mut state.writer);
                (piece, len)
            })
        })
        .await?;
        Ok(piece.map(|(piece, len)| {
            self.offset += len as u64;
            piece
        }))
    }

    fn poll<T>(
        &self,
        context: &mut Context<'_>,
        take: impl FnOnce(&mut State, Piece) -> T,
    ) -> Poll<Result<Option<T>, SpoolError>> {
        let mut state = self.spool.lock();
        if let Some(piece) = state.piece(self.offset) {
            return Poll::Ready(Ok(Some(take(&mut state, piece))));
        }
        match &state.progress {
            Progress::Complete => Poll::Ready(Ok(None)),
            Progress::Failed(why) => Poll::Ready(Err(SpoolError::Failed(Arc::clone(why)))),
            Progress::Receiving => {
                if let Some(reading) = state.readers.get_mut(&self.id) {
                    reading.waker = Some(context.waker().clone());
                }
                Poll::Pending
            }
        }
    }
}

impl Drop for SpoolReader {
    fn drop(&mut self) {
        let mut state = self.spool.lock();
        state.readers.remove(&self.id);
        state.trim();
        wake(&mut state.writer);
        if state.readers.is_empty() {
            state.closers.drain(..).for_each(Waker::wake);
        }
        state.offer();
        state.let_go();
    }
}

#[cfg(test)]
mod tests {
    use shuttle::{check_random, future::block_on, thread};

    use super::*;

    const CHUNK: usize = 1000;
    const CHUNKS: usize = 12;

    fn chunk(number: usize) -> Bytes {
        vec![number as u8; CHUNK].into()
    }

    /// Reads to the end, the failure or wherever `stop` says, and checks each byte.
    fn follow(mut reader: SpoolReader, stop: usize) -> Result<usize, SpoolError> {
        let mut got = 0;
        while got < stop {
            let Some(piece) = block_on(reader.piece())? else { break };
            for byte in piece.read()? {
                assert_eq!(usize::from(byte), got / CHUNK);
                got += 1;
            }
        }
        Ok(got)
    }

    fn write(writer: SpoolWriter, chunks: usize) {
        for number in 0..chunks {
            if block_on(writer.room()).is_err() {
                return;
            }
            writer.appender().append(chunk(number));
        }
        if chunks == CHUNKS {
            writer.finish();
        }
    }

    /// Readers and a writer in every order that the model tries: all is read, or it is a failure, and never a short end.
    fn model(keep: Keep, file: bool, writes: usize, readers: usize) {
        check_random(
            move || {
                let file = file.then(|| tempfile::tempfile().unwrap());
                let writer = Spool::begin((CHUNK * CHUNKS) as u64, keep, file, Vec::new());
                let spool = Arc::clone(writer.spool());
                let inside: Vec<SpoolReader> = (0..readers).map(|_| spool.read().unwrap()).collect();
                let writing = thread::spawn(move || write(writer, writes));
                let reading: Vec<_> = inside
                    .into_iter()
                    .enumerate()
                    .map(|(number, reader)| {
                        // Some leave midway.
                        let stop = if number % 3 == 2 { CHUNK * (number % CHUNKS) } else { usize::MAX };
                        thread::spawn(move || (stop, follow(reader, stop)))
                    })
                    .collect();
                let closing = {
                    let spool = Arc::clone(&spool);
                    thread::spawn(move || {
                        spool.begin_to_close();
                        assert!(spool.read().is_none(), "somebody was let in after the gate was closed");
                        block_on(spool.drained());
                        let state = spool.lock();
                        assert!(state.readers.is_empty() && state.file.is_none() && state.window.is_empty());
                    })
                };
                for reading in reading {
                    match reading.join().unwrap() {
                        (_, Err(SpoolError::Failed(_))) => assert_ne!(writes, CHUNKS),
                        (_, Err(error)) => panic!("{error}"),
                        (stop, Ok(got)) if stop == usize::MAX => assert_eq!(got, CHUNK * CHUNKS),
                        (stop, Ok(got)) => assert!(got >= stop.min(CHUNK * writes)),
                    }
                }
                writing.join().unwrap();
                closing.join().unwrap();
            },
            300,
        );
    }

    #[test]
    fn readers_of_memory_a_window_and_a_file_get_all_of_it_and_the_gate_closes_after_them() {
        for (keep, file) in [(Keep::All, false), (Keep::Window, false), (Keep::File, true)] {
            model(keep, file, CHUNKS, 5);
        }
    }

    #[test]
    fn a_writer_that_is_dropped_is_a_failure_and_never_an_end() {
        for (keep, file) in [(Keep::All, false), (Keep::Window, false), (Keep::File, true)] {
            model(keep, file, 7, 4);
        }
    }

    #[test]
    fn sixty_four_readers_leave_before_it_is_let_go() {
        check_random(
            || {
                let file = tempfile::tempfile().unwrap();
                let writer = Spool::begin((CHUNK * CHUNKS) as u64, Keep::File, Some(file), Vec::new());
                let spool = Arc::clone(writer.spool());
                let inside: Vec<SpoolReader> = (0..64).map(|_| spool.read().unwrap()).collect();
                let reading: Vec<_> =
                    inside.into_iter().map(|reader| thread::spawn(|| follow(reader, usize::MAX))).collect();
                let writing = thread::spawn(move || write(writer, CHUNKS));
                spool.begin_to_close();
                block_on(spool.drained());
                assert!(spool.lock().file.is_none());
                reading.into_iter().for_each(|reader| assert!(reader.join().unwrap().is_ok()));
                writing.join().unwrap();
            },
            20,
        );
    }

    #[test]
    fn one_who_joins_while_the_beginning_is_there_gets_a_file_and_one_who_comes_later_is_refused() {
        check_random(
            || {
                let writer = Spool::begin((CHUNK * CHUNKS) as u64, Keep::Window, None, Vec::new());
                let spool = Arc::clone(writer.spool());
                let first = spool.read().unwrap();
                let reading = thread::spawn(|| follow(first, usize::MAX));
                let writing = thread::spawn(move || write(writer, CHUNKS));
                if let Some(second) = spool.read() {
                    if spool.wants_file() {
                        let budget = super::super::budget::Budget::new(1, Arc::default()).reserve(1).unwrap();
                        spool.give_file(tempfile::tempfile().unwrap(), budget);
                    }
                    assert_eq!(follow(second, usize::MAX).unwrap(), CHUNK * CHUNKS);
                }
                assert_eq!(reading.join().unwrap().unwrap(), CHUNK * CHUNKS);
                writing.join().unwrap();
            },
            500,
        );
    }
}
