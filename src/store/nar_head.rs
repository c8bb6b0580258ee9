//! The head of a NAR of many small files, written into the file of its copy while the tree is laid out.
//!
//! It may end anywhere: where a long file comes, where the disk is slow, or where the files turn out not to be small. Whoever
//! makes the copy goes on behind it. Nobody sees it before the length of the whole NAR has proven right.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copy_file::{CopyFile, Leave};

/// Files are small where an entry has fewer bytes of the NAR than this on average; larger ones are read as fast from where they are.
const SMALL: u64 = 16 * 1024;
/// Nothing of a NAR is sent before it is laid out, so that may take no longer because the files are read.
const PATIENCE: Duration = Duration::from_millis(250);

/// Whether so many bytes of a NAR are those of small files.
pub(super) fn are_small(bytes: u64, entries: u64) -> bool {
    bytes / entries.max(1) < SMALL
}

/// What makes the file, once it is known that the first files are small.
type MakeFile = Box<dyn FnOnce() -> Option<(CopyFile, Leave)> + Send>;

/// The bytes of a NAR from its beginning on, and leave to write what follows.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) file: Arc<CopyFile>,
    pub(super) len: u64,
    pub(super) leave: Leave,
}

/// A head that is being written.
pub(super) struct NarHead {
    /// As long as there is no file.
    make: Option<MakeFile>,
    written: Option<Head>,
    entries: u64,
    /// NarSize: there is room for so many bytes.
    most: u64,
    until: Instant,
}

impl NarHead {
    /// A head of a NAR of `nar_size` bytes that has nothing yet, and no file.
    pub(super) fn new(nar_size: u64, make: MakeFile) -> Self {
        let until = Instant::now() + PATIENCE;
        Self { make: Some(make), written: None, entries: 0, most: nar_size, until }
    }

    /// On a machine that is busy, too.
    #[cfg(test)]
    pub(super) fn patient(mut self) -> Self {
        self.until += Duration::from_secs(3600);
        self
    }

    /// When it ends, however far it is.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// Takes the bytes that come next, so many entries of the NAR, unless it ends before them. False: it wants no more.
    pub(super) fn put(&mut self, bytes: &[u8], entries: usize) -> bool {
        self.entries += entries as u64;
        let len = self.written.as_ref().map_or(0, |head| head.len) + bytes.len() as u64;
        if len > self.most || !are_small(len, self.entries) {
            return false;
        }
        if let Some((file, leave)) = self.make.take().and_then(|make| make()) {
            self.written = Some(Head { file: Arc::new(file), len: 0, leave });
        }
        let Some(head) = &mut self.written else { return false };
        if head.file.write_all_at(bytes, head.len).is_err() {
            // Whoever goes on says so, if it fails there as well.
            return false;
        }
        head.len = len;
        Instant::now() < self.until
    }

    /// What there is of it. `None`: nothing.
    pub(super) fn end(self) -> Option<Head> {
        self.written
    }
}
