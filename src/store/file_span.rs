//! A part of an open file that the kernel may send as it is, without a copy through this process.

use std::fmt::Debug;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::ReadWriteFlags;

/// What is longer than this by [`SHORTEST`] is cut: one call may not keep a thread that others wait for.
const LONG: u64 = 1024 * 1024;
/// So far apart it is looked whether the bytes are in memory: the kernel reads files in pieces about as long.
const APART: usize = 128 * 1024;
/// A shorter one costs more in system calls than a copy of it.
pub(super) const SHORTEST: u64 = 64 * 1024;

/// A file that is open, and whatever goes with it.
trait OpenFile: AsFd + Debug + Send + Sync {}

impl<T: AsFd + Debug + Send + Sync> OpenFile for T {}

/// A part of a file. It is there as long as this is, even if the file is deleted.
#[derive(Debug)]
pub struct FileSpan {
    file: Arc<dyn OpenFile>,
    range: Range<u64>,
}

impl FileSpan {
    /// No span is longer, in bytes.
    pub const LONGEST: usize = (LONG + SHORTEST) as usize;

    /// The beginning of this range, if that is worth it and in memory: who sends may not wait for the disk.
    pub(super) fn in_memory<F>(file: &Arc<F>, range: Range<u64>) -> Option<Self>
    where
        F: AsFd + Debug + Send + Sync + 'static,
    {
        let len = range.end.saturating_sub(range.start);
        if len < SHORTEST {
            return None;
        }
        // No rest is left that would be too short for another one.
        let range = range.start..range.start + if len < LONG + SHORTEST { len } else { LONG };
        let looked_at = range.clone().step_by(APART).chain([range.end - 1]);
        // What lies between two that are there came with one of them, mostly: where it was taken back since, sending waits for the disk.
        let last = looked_at.take_while(|at| is_in_memory(&**file, *at)).last()?;
        let range = range.start..if last + 1 == range.end { range.end } else { last };
        (range.end >= range.start + SHORTEST).then(|| Self { file: file.clone(), range })
    }

    /// Bytes that are still to be sent.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.range.end - self.range.start).unwrap_or_default()
    }

    /// Whether all was sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Sends the next bytes, `at_most` so many, and says how many the socket took. A file that became shorter is
    /// [`io::ErrorKind::UnexpectedEof`], and a socket that is full [`io::ErrorKind::WouldBlock`].
    pub fn send(&mut self, socket: impl AsFd, at_most: usize) -> io::Result<usize> {
        let len = self.len().min(at_most);
        let sent = rustix::fs::sendfile(socket, &*self.file, Some(&mut self.range.start), len)?;
        if sent == 0 && len > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
        }
        Ok(sent)
    }
}

fn is_in_memory(file: impl AsFd, at: u64) -> bool {
    let mut byte = [0];
    // A file system that can't say is one that has to be waited for.
    let read = rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], at, ReadWriteFlags::NOWAIT);
    read == Ok(1)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A folder that lies on no tmpfs where that can be helped: one can't say what of it is in memory.
    pub(in super::super) fn folder_on_disk() -> tempfile::TempDir {
        tempfile::tempdir_in("/var/tmp").or_else(|_| tempfile::tempdir()).unwrap()
    }

    #[test]
    fn spans_leave_no_rest_that_is_too_short_and_a_range_of_nothing_has_none() {
        let folder = folder_on_disk();
        let file = tempfile::tempfile_in(folder.path()).unwrap();
        let len = 3 * LONG + SHORTEST - 1;
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![7; len as usize], 0).unwrap();
        let file = Arc::new(file);
        let (mut lens, mut at) = (Vec::new(), 0);
        while let Some(span) = FileSpan::in_memory(&file, at..len) {
            lens.push(span.len() as u64);
            at += span.len() as u64;
        }
        assert_eq!((lens, at), (vec![LONG, LONG, LONG + SHORTEST - 1], len));
        #[expect(clippy::reversed_empty_ranges, reason = "what could come of a copy that lost its bytes")]
        let reversed = LONG..0;
        assert!(FileSpan::in_memory(&file, reversed).is_none());
    }
}
