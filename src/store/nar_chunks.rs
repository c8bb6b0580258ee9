//! The chunks of a NAR, read from its tree.
//!
//! What is in memory is read where the next chunk is asked for; everything else (the disk, many small files to be opened) is done
//! by blocking tasks, a chunk each, so that a slow reader holds a few buffers and never a thread. Where files are small, opening
//! them takes most of the time: then several chunks are read at once.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::{JoinHandle, spawn_blocking};

use super::buffers::{BufferPool, CHUNK, SHORT_CHUNK};
use super::copy_file::CopyFile;
use super::file_span::{FileSpan, SHORTEST};
use super::nar_read_error::NarReadError;
use super::nar_reader::NarReader;

/// Chunks of one NAR that are read at the same time.
const AT_ONCE: usize = 4;

/// Reads a NAR in chunks, in their order.
#[derive(Debug)]
pub(super) struct NarChunks {
    /// What no task reads yet. `None` while one reads on with it.
    rest: Option<Box<NarReader>>,
    /// In the order of the NAR.
    tasks: VecDeque<JoinHandle<Filled>>,
    pool: BufferPool,
    copy: Option<CopiedTo>,
    /// Who reads takes spans, too: then what comes before one is given out by itself.
    takes_spans: bool,
    /// Small files could be opened and read here and now when that was tried last.
    may_read: bool,
}

/// Where each chunk is written to as well, from its place on.
#[derive(Clone, Debug)]
struct CopiedTo {
    file: Arc<CopyFile>,
    at: u64,
}

#[derive(Debug)]
struct Filled {
    chunk: Result<Bytes, NarReadError>,
    /// Comes back with the file that it has open.
    rest: Option<Box<NarReader>>,
}

impl NarChunks {
    pub(super) fn new(reader: NarReader, pool: BufferPool) -> Self {
        let rest = Some(Box::new(reader));
        Self { rest, tasks: VecDeque::new(), pool, copy: None, takes_spans: false, may_read: true }
    }

    /// Writes each chunk into the file too, from `at` on, before it is given out.
    pub(super) fn copied_to(mut self, file: Arc<CopyFile>, at: u64) -> Self {
        self.copy = Some(CopiedTo { file, at });
        self
    }

    /// The next chunk; `None` is the end. Not to be asked again after an error.
    pub(super) fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, NarReadError>>> {
        if self.tasks.is_empty()
            && let Some(cached) = self.fill_cached().transpose()
        {
            return Poll::Ready(Some(cached));
        }
        if self.tasks.is_empty() {
            self.start_one(self.pool.place());
        }
        self.read_ahead();
        let Some(first) = self.tasks.front_mut() else { return Poll::Ready(None) };
        let done = ready!(Pin::new(first).poll(context));
        self.tasks.pop_front();
        let Ok(Filled { chunk, rest }) = done else {
            return Poll::Ready(Some(Err(NarReadError::Stopped)));
        };
        self.rest = rest.or(self.rest.take());
        if chunk.is_ok() {
            // The next ones are filled while this one is sent, where there are places.
            if self.tasks.is_empty()
                && !self.is_inside_file()
                && let Some(place) = self.pool.place()
            {
                self.start_one(Some(place));
            }
            self.read_ahead();
        }
        Poll::Ready(Some(chunk))
    }

    /// The next bytes, if they are those of one file, in memory, that need not be read here.
    pub(super) fn span(&mut self) -> Option<FileSpan> {
        self.takes_spans = self.copy.is_none();
        let may_be = self.tasks.is_empty() && self.takes_spans;
        self.rest.as_mut().filter(|rest| may_be && rest.is_inside_file(SHORTEST))?.span()
    }

    /// Whether the next chunk may be had here and now. A copy is written by tasks alone.
    fn is_inside_file(&self) -> bool {
        self.copy.is_none() && self.rest.as_ref().is_some_and(|rest| rest.is_inside_file(CHUNK as u64))
    }

    fn fill_cached(&mut self) -> Result<Option<Bytes>, NarReadError> {
        if self.copy.is_some() {
            return Ok(None);
        }
        let Some(rest) = &mut self.rest else { return Ok(None) };
        let is_inside_file = rest.is_inside_file(CHUNK as u64);
        let place = is_inside_file.then(|| self.pool.place()).flatten();
        let mut buffer = if is_inside_file {
            self.pool.take_in(place.as_ref())
        } else if (self.may_read && rest.is_quick(SHORT_CHUNK as u64))
            // Whatever was missing before: a file that the socket takes has to be opened here.
            || (self.takes_spans && rest.is_near_file(SHORTEST))
        {
            self.pool.take_short()
        } else {
            return Ok(None);
        };
        // The socket takes what follows.
        let at_file = if self.takes_spans { SHORTEST } else { u64::MAX };
        let filled = rest.fill_cached(&mut buffer, at_file);
        if !is_inside_file {
            // If nothing is there, tasks read what follows, several chunks at once.
            self.may_read = matches!(filled, Ok(1..));
        }
        match filled {
            Ok(filled) if filled > 0 => Ok(Some(self.pool.share(buffer, filled, place))),
            nothing => {
                self.pool.give_back(buffer);
                nothing.map(|_| None)
            }
        }
    }

    fn read_ahead(&mut self) {
        while !self.tasks.is_empty() && self.tasks.len() < AT_ONCE && self.rest.is_some() {
            if self.is_inside_file() {
                return;
            }
            let Some(place) = self.pool.spare_place() else { return };
            if !self.start_one(Some(place)) {
                return;
            }
        }
    }

    /// Starts to read the next chunk. False: there is none, or it is the next task's that comes back.
    fn start_one(&mut self, place: Option<OwnedSemaphorePermit>) -> bool {
        let Some(mut rest) = self.rest.take_if(|rest| rest.remaining() > 0) else { return false };
        let chunk = if place.is_some() { CHUNK } else { SHORT_CHUNK } as u64;
        let len = rest.remaining().min(chunk);
        let copy = self.copy.clone();
        if let Some(copy) = &mut self.copy {
            copy.at += len;
        }
        // A large file is read on by one reader, which keeps it open. The way to a range far behind is a task's too.
        let reads_on = len < chunk || rest.to_skip() > chunk || rest.is_at_file(len);
        let mut part = if reads_on {
            rest
        } else {
            let part = Box::new(rest.split_off(len));
            self.rest = Some(rest);
            part
        };
        let pool = self.pool.clone();
        self.tasks.push_back(spawn_blocking(move || {
            let mut buffer = pool.take_in(place.as_ref());
            let filled = part.fill(&mut buffer).and_then(|filled| {
                copy.map_or(Ok(()), |copy| copy.write(&buffer[..filled]))?;
                Ok(filled)
            });
            let chunk = filled.map(|filled| pool.share(buffer, filled, place));
            Filled { chunk, rest: reads_on.then_some(part) }
        }));
        true
    }
}

impl CopiedTo {
    fn write(&self, bytes: &[u8]) -> Result<(), NarReadError> {
        self.file.write_all_at(bytes, self.at).map_err(NarReadError::Copy)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::path::Path;

    use super::super::file_span::tests::folder_on_disk;
    use super::super::tree::lay_out;
    use super::*;

    /// The NAR of a folder with so many files of that size, from its beginning, and how long it is.
    fn chunks_of(folder: &Path, files: usize, size: usize, pool: &BufferPool) -> (NarChunks, u64) {
        for file in 0..files {
            std::fs::write(folder.join(format!("f{file}")), vec![b'x'; size]).unwrap();
        }
        let layout = Arc::new(lay_out(folder, None, || true).unwrap());
        let len = layout.len();
        (NarChunks::new(NarReader::new(folder.to_owned(), layout, 0..len), pool.clone()), len)
    }

    #[tokio::test]
    async fn what_the_socket_takes_is_opened_here_whatever_was_missing_before() {
        let folder = folder_on_disk();
        let (mut chunks, len) = chunks_of(folder.path(), 3, 100_000, &BufferPool::default());
        let (mut spans, mut read) = (0, 0);
        while read < len {
            chunks.may_read = false;
            if let Some(span) = chunks.span() {
                (spans, read) = (spans + 1, read + span.len() as u64);
                continue;
            }
            read += poll_fn(|context| chunks.poll_next(context)).await.unwrap().unwrap().len() as u64;
            assert!(chunks.tasks.is_empty());
        }
        assert_eq!(spans, 3);
    }

    #[tokio::test]
    async fn a_chunk_keeps_its_place_until_it_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let pool = BufferPool::default();
        let free = pool.places();
        let (mut chunks, len) = chunks_of(folder.path(), 4000, 500, &pool);
        let first = poll_fn(|context| chunks.poll_next(context)).await.unwrap().unwrap();
        assert!(!first.is_empty());
        while !chunks.tasks.iter().all(JoinHandle::is_finished) {
            tokio::task::yield_now().await;
        }
        assert_eq!((chunks.tasks.len(), free - pool.places()), (AT_ONCE, AT_ONCE + 1));
        let mut read = first.len() as u64;
        drop(first);
        while let Some(chunk) = poll_fn(|context| chunks.poll_next(context)).await {
            read += chunk.unwrap().len() as u64;
        }
        assert_eq!((read, pool.places()), (len, free));
        // Without a place a chunk is short, and one at a time is read.
        let _taken: Vec<_> = std::iter::from_fn(|| pool.place()).collect();
        let (mut chunks, len) = chunks_of(folder.path(), 4000, 500, &pool);
        let mut read = 0;
        while let Some(chunk) = poll_fn(|context| chunks.poll_next(context)).await {
            let chunk = chunk.unwrap();
            assert!(chunk.len() <= SHORT_CHUNK && chunks.tasks.len() <= 1);
            read += chunk.len() as u64;
        }
        assert_eq!(read, len);
    }
}
