//! The head of a NAR of many small files, written into the file of its copy while the tree is laid out.
//!
//! It may end anywhere: where a long file comes, where the disk is slow, or where the files turn out not to be small. Whoever
//! makes the copy goes on behind it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copy_file::CopyFile;

/// Files are small where an entry has fewer bytes of the NAR than this on average; larger ones are read as fast from where they are.
const SMALL: u64 = 16 * 1024;
/// Nothing of a NAR is sent before it is laid out, so that may take no longer because the files are read.
const LONGEST: Duration = Duration::from_millis(250);

/// Whether so many bytes of a NAR are those of small files.
pub(super) fn are_small(bytes: u64, entries: u64) -> bool {
    bytes / entries.max(1) < SMALL
}

/// What makes the file, once it is known that the first files are small.
type MakeFile = Box<dyn FnOnce() -> Option<CopyFile> + Send>;

/// A file, and how many bytes of a NAR it has from its beginning on.
pub(super) type Head = (Arc<CopyFile>, u64);

/// A head that is being written.
pub(super) struct NarHead {
    make: Option<MakeFile>,
    file: Option<Arc<CopyFile>>,
    len: u64,
    entries: u64,
    until: Instant,
}

impl NarHead {
    /// A head that has nothing yet, and no file.
    pub(super) fn new(make: MakeFile) -> Self {
        Self { make: Some(make), file: None, len: 0, entries: 0, until: Instant::now() + LONGEST }
    }

    /// Takes what comes next, so many entries of the NAR. False: it ended, and does not want what comes after. An end for want of time has these bytes.
    pub(super) fn put(&mut self, bytes: &[u8], entries: usize) -> bool {
        self.entries += entries as u64;
        if !are_small(self.len + bytes.len() as u64, self.entries) {
            return false;
        }
        if let Some(make) = self.make.take() {
            self.file = make().map(Arc::new);
        }
        let Some(file) = &self.file else { return false };
        if file.write_all_at(bytes, self.len).is_err() {
            // Whoever goes on says so, if it fails there as well.
            return false;
        }
        self.len += bytes.len() as u64;
        Instant::now() < self.until
    }

    /// What there is of it. `None`: nothing.
    pub(super) fn end(self) -> Option<Head> {
        Some((self.file?, self.len))
    }
}
