//! The bytes of a NAR, or of a range of it, from the files of its tree, a chunk at a time. Blocking, but for what says that it
//! goes on only with what is in memory.
//!
//! The layout says what belongs where; each file has to be what it was when it was laid out. What is missing, short or
//! changed is an error, and never an early end.

use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::ResolveFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::file_span::FileSpan;
use super::nar_read_error::NarReadError;
use super::open_directory::OpenDirectory;
use crate::nix::layout::{Cursor, FileMeta, NarLayout, Step};

/// Steps that are looked at ahead of reading.
const NEAR: usize = 32;
/// More files than that take several threads less time to open than one.
const MOST_FILES: usize = 8;

/// Reads one NAR from front to back.
#[derive(Debug)]
pub(super) struct NarReader {
    root: PathBuf,
    layout: Arc<NarLayout>,
    cursor: Cursor,
    /// Literal bytes that were written by the cursor and not given out yet, from `literal_at` on.
    literal: Vec<u8>,
    literal_at: usize,
    file: Option<OpenFile>,
    directory: OpenDirectory,
    /// Bytes to pass over before the range begins, and bytes to give out after that.
    skip: u64,
    remaining: u64,
}

/// The file whose contents come next.
#[derive(Debug)]
struct OpenFile {
    file: Arc<File>,
    at: u64,
    size: u64,
    /// Where the cursor was before it named this file.
    before: Cursor,
}

impl NarReader {
    /// Reads `range` of the NAR of the tree at `root`.
    pub(super) fn new(root: PathBuf, layout: Arc<NarLayout>, range: Range<u64>) -> Self {
        let directory = OpenDirectory::new(root.clone());
        Self {
            root,
            layout,
            cursor: Cursor::default(),
            literal: Vec::with_capacity(1024),
            literal_at: 0,
            file: None,
            directory,
            skip: range.start,
            remaining: range.end.saturating_sub(range.start),
        }
    }

    /// Bytes that are still to come.
    pub(super) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Whether at least `bytes` of one open file come next: then reading needs no look at the tree.
    pub(super) fn is_inside_file(&self, bytes: u64) -> bool {
        let left = |file: &OpenFile| file.size - file.at;
        self.skip == 0
            && self.literal_at == self.literal.len()
            && self.file.as_ref().is_some_and(|file| left(file).min(self.remaining) >= bytes)
    }

    /// Whether few small files make the next `bytes`, so that filling takes no longer where they are asked for than by another thread.
    pub(super) fn is_quick(&self, bytes: u64) -> bool {
        if self.skip > 0 {
            return false;
        }
        let open = self.file.as_ref().map_or(0, |file| file.size - file.at);
        let mut there = (self.literal.len() - self.literal_at) as u64 + open;
        let (mut cursor, mut literal, mut files) = (self.cursor, Vec::new(), 0);
        for _ in 0..NEAR {
            if there >= bytes {
                return true;
            }
            match cursor.advance(&self.layout, &mut literal) {
                Step::File { meta, .. } if files < MOST_FILES => {
                    there += meta.size;
                    files += 1;
                }
                Step::File { .. } => return false,
                Step::Finished => return true,
                _ => {}
            }
        }
        false
    }

    /// Whether the next file that is not empty is near, and has at least `bytes`.
    pub(super) fn is_near_file(&self, bytes: u64) -> bool {
        if self.skip > 0 || self.file.is_some() {
            return false;
        }
        let (mut cursor, mut literal) = (self.cursor, Vec::new());
        (0..NEAR).find_map(|_| match cursor.advance(&self.layout, &mut literal) {
            Step::File { meta, .. } if meta.size > 0 => Some(meta.size.min(self.remaining) >= bytes),
            Step::Finished => Some(false),
            _ => None,
        }) == Some(true)
    }

    /// Whether a file comes next of which at least `bytes` are left, opened or not.
    pub(super) fn is_at_file(&self, bytes: u64) -> bool {
        if self.file.is_some() || self.literal_at < self.literal.len() {
            return self.is_inside_file(bytes);
        }
        let (mut cursor, mut literal) = (self.cursor, Vec::new());
        let Step::File { meta, .. } = cursor.advance(&self.layout, &mut literal) else { return false };
        (literal.len() as u64 + meta.size).saturating_sub(self.skip).min(self.remaining) >= bytes
    }

    /// How many bytes have to be passed over before those that are given out.
    pub(super) fn to_skip(&self) -> u64 {
        self.skip
    }

    /// Cuts off the next `bytes`, as a reader of its own that may be read at the same time. Nothing is opened for it.
    pub(super) fn split_off(&mut self, bytes: u64) -> Self {
        let directory = OpenDirectory::new(self.directory.path().to_owned());
        let mut rest = Self {
            root: self.root.clone(),
            layout: Arc::clone(&self.layout),
            cursor: self.cursor,
            literal: self.literal.clone(),
            literal_at: self.literal_at,
            file: None,
            directory,
            skip: self.skip + bytes,
            remaining: self.remaining.saturating_sub(bytes),
        };
        if let Some(file) = &self.file {
            // Back to the step that named the file, to pass over what was given of it.
            rest.cursor = file.before;
            rest.skip += self.literal_at as u64 + file.at;
            rest.literal.clear();
            rest.literal_at = 0;
        }
        rest.pass_over();
        let mut first = std::mem::replace(self, rest);
        first.remaining = first.remaining.min(bytes);
        first
    }

    /// Moves over what is to be skipped, up to the step in which that ends.
    fn pass_over(&mut self) {
        loop {
            let there = (self.literal.len() - self.literal_at) as u64;
            if self.skip < there {
                return;
            }
            self.skip -= there;
            self.literal.clear();
            self.literal_at = 0;
            if self.skip == 0 {
                return;
            }
            let before = self.cursor;
            match self.cursor.advance(&self.layout, &mut self.literal) {
                Step::Enter(name) => self.directory.enter(name),
                Step::Leave => self.directory.leave(&self.root),
                Step::File { meta, .. } => {
                    let behind = self.literal.len() as u64 + meta.size;
                    self.literal.clear();
                    if self.skip < behind {
                        self.cursor = before;
                        return;
                    }
                    self.skip -= behind;
                }
                Step::Symlink { .. } => {}
                Step::Finished if self.literal.is_empty() => return,
                Step::Finished => {}
            }
        }
    }

    /// Fills the buffer, or as much of it as the NAR has left. Returns the bytes filled; 0 is the end.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, NarReadError> {
        let mut filled = 0;
        while filled < buffer.len() && self.remaining > 0 {
            if self.literal_at < self.literal.len() {
                filled += self.give_literal(&mut buffer[filled..]);
            } else if self.file.is_some() {
                let flags = ReadWriteFlags::empty();
                filled += self.give_contents(&mut buffer[filled..], flags)?.unwrap_or(0);
            } else {
                self.step(ResolveFlags::empty())?;
            }
        }
        Ok(filled)
    }

    /// Fills the buffer, or as much of it as can be had here and now, up to the next file of `at_file` bytes or more. 0: the disk has to
    /// be asked.
    pub(super) fn fill_cached(&mut self, buffer: &mut [u8], at_file: u64) -> Result<usize, NarReadError> {
        let mut filled = 0;
        while filled < buffer.len() && self.remaining > 0 {
            if self.literal_at < self.literal.len() {
                filled += self.give_literal(&mut buffer[filled..]);
            } else if let Some(file) = &self.file {
                if filled > 0 && file.size - file.at >= at_file {
                    break;
                }
                let Some(read) = self.give_contents(&mut buffer[filled..], ReadWriteFlags::NOWAIT)? else {
                    break;
                };
                filled += read;
            } else if !self.step(ResolveFlags::CACHED)? {
                break;
            }
        }
        Ok(filled)
    }

    /// The next bytes of the open file, inside which this has to be, if they need not be read here.
    pub(super) fn span(&mut self) -> Option<FileSpan> {
        let file = self.file.as_mut()?;
        let len = (file.size - file.at).min(self.remaining);
        let span = FileSpan::in_memory(&file.file, file.at..file.at + len)?;
        file.at += span.len() as u64;
        self.remaining -= span.len() as u64;
        if file.at == file.size {
            self.file = None;
        }
        Some(span)
    }

    fn give_literal(&mut self, buffer: &mut [u8]) -> usize {
        let there = &self.literal[self.literal_at..];
        let skipped = self.skip.min(there.len() as u64) as usize;
        let len = (there.len() - skipped).min(buffer.len()).min(clamp(self.remaining));
        buffer[..len].copy_from_slice(&there[skipped..skipped + len]);
        self.literal_at += skipped + len;
        self.skip -= skipped as u64;
        self.remaining -= len as u64;
        len
    }

    fn give_contents(
        &mut self,
        buffer: &mut [u8],
        flags: ReadWriteFlags,
    ) -> Result<Option<usize>, NarReadError> {
        let Some(file) = &mut self.file else { return Ok(None) };
        let skipped = self.skip.min(file.size - file.at);
        file.at += skipped;
        self.skip -= skipped;
        let len = clamp((file.size - file.at).min(self.remaining)).min(buffer.len());
        let mut got = 0;
        while got < len {
            let mut slices = [IoSliceMut::new(&mut buffer[got..len])];
            match rustix::io::preadv2(&file.file, &mut slices, file.at, flags) {
                Ok(0) => return Err(NarReadError::Changed(self.directory.path().to_owned())),
                Ok(read) => {
                    got += read;
                    file.at += read as u64;
                }
                Err(Errno::INTR) => {}
                // Not in memory, or a file system that can't say.
                Err(Errno::AGAIN | Errno::OPNOTSUPP) if !flags.is_empty() => break,
                Err(source) => {
                    return Err(NarReadError::Io { path: self.directory.path().to_owned(), source });
                }
            }
        }
        self.remaining -= got as u64;
        if file.at == file.size {
            self.file = None;
        }
        Ok((got > 0 || len == 0).then_some(got))
    }

    /// Moves to the next literal bytes and, behind them, the next file. False: that can't be opened in this way, and nothing moved.
    fn step(&mut self, how: ResolveFlags) -> Result<bool, NarReadError> {
        self.literal.clear();
        self.literal_at = 0;
        let before = self.cursor;
        match self.cursor.advance(&self.layout, &mut self.literal) {
            Step::Enter(name) => self.directory.enter(name),
            Step::Leave => self.directory.leave(&self.root),
            Step::File { name, meta } => {
                let behind = self.literal.len() as u64 + meta.size;
                if self.skip >= behind {
                    // Before the range: not even opened.
                    self.skip -= behind;
                    self.literal.clear();
                } else if meta.size > 0 {
                    match self.directory.open(name, meta, how) {
                        Ok(file) => self.file = Some(OpenFile::new(file, meta, before)),
                        Err(error) if how.is_empty() => return Err(error),
                        // Whoever may wait opens it, or says what is wrong.
                        Err(_) => {
                            self.cursor = before;
                            self.literal.clear();
                            return Ok(false);
                        }
                    }
                }
            }
            Step::Symlink { .. } => {}
            Step::Finished if self.literal.is_empty() => {
                return Err(NarReadError::Short(self.root.clone()));
            }
            Step::Finished => {}
        }
        Ok(true)
    }
}

impl OpenFile {
    fn new(file: OwnedFd, meta: FileMeta, before: Cursor) -> Self {
        Self { file: Arc::new(file.into()), at: 0, size: meta.size, before }
    }
}

fn clamp(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::file_span::tests::folder_on_disk;
    use super::super::tree;
    use super::super::tree_error::TreeError;
    use super::*;
    use proptest::prelude::*;
    use std::io::Read as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::Path;

    /// Fills a folder with a tree that is drawn by lot: each step is a kind, a name and a size.
    fn grow(root: &Path, steps: &[(u8, u8, u16)]) {
        let mut place = root.to_owned();
        std::fs::create_dir(&place).unwrap();
        for &(kind, name, size) in steps {
            let path = place.join(["a", "a.b", "a b", "a+", "z", "ü", ".x", "漢"][usize::from(name % 8)]);
            if path.symlink_metadata().is_ok() {
                continue;
            }
            match kind % 5 {
                0 => {
                    std::fs::create_dir(&path).unwrap();
                    place = path;
                }
                1 if place != root => {
                    place.pop();
                }
                2 => symlink(format!("target-{size}"), &path).unwrap(),
                kind => {
                    std::fs::write(&path, vec![name; usize::from(size)]).unwrap();
                    let mode = if kind == 3 { 0o755 } else { 0o644 };
                    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
                }
            }
        }
    }

    fn read(root: &Path, layout: &Arc<NarLayout>, range: Range<u64>, chunk: usize) -> Vec<u8> {
        let mut reader = NarReader::new(root.to_owned(), Arc::clone(layout), range);
        let (mut nar, mut buffer) = (Vec::new(), vec![0; chunk]);
        loop {
            let quick = reader.is_quick(chunk as u64);
            let mut filled = if quick { reader.fill_cached(&mut buffer, 20_000).unwrap() } else { 0 };
            if filled == 0 {
                filled = reader.fill(&mut buffer).unwrap();
            }
            if filled == 0 {
                assert_eq!(reader.remaining(), 0);
                return nar;
            }
            nar.extend_from_slice(&buffer[..filled]);
        }
    }

    /// Each part by a reader of its own, and the last part first; every third is read a little before it is cut.
    fn read_in_parts(root: &Path, layout: &Arc<NarLayout>, range: Range<u64>, chunk: usize) -> Vec<u8> {
        // Each part that was begun keeps its file open.
        let chunk = chunk.max(usize::try_from(range.end - range.start).unwrap() / 256);
        let mut rest = NarReader::new(root.to_owned(), Arc::clone(layout), range);
        let mut parts = Vec::new();
        while rest.remaining() > 0 {
            let mut begun = vec![0; if parts.len() % 3 == 2 { chunk / 2 } else { 0 }];
            let filled = rest.fill(&mut begun).unwrap();
            begun.truncate(filled);
            if parts.len() % 4 == 1 {
                let mut cached = vec![0; chunk];
                let filled = rest.fill_cached(&mut cached, chunk as u64 / 2).unwrap();
                begun.extend_from_slice(&cached[..filled]);
            }
            if rest.is_at_file(chunk as u64) {
                assert!(rest.remaining() >= chunk as u64);
            }
            parts.push((begun, rest.split_off(chunk as u64)));
        }
        let read = |(mut begun, mut part): (Vec<u8>, NarReader)| {
            let mut buffer = vec![0; chunk + 1];
            let filled = part.fill(&mut buffer).unwrap();
            assert_eq!(part.remaining(), 0);
            begun.extend_from_slice(&buffer[..filled]);
            begun
        };
        let mut parts: Vec<Vec<u8>> = parts.into_iter().rev().map(read).collect();
        parts.reverse();
        parts.concat()
    }

    proptest! {
        #[test]
        fn any_tree_and_any_range_of_it_is_what_another_writer_of_nars_says(
            steps in prop::collection::vec(any::<(u8, u8, u16)>(), 0..30),
            chunk in 1usize..20_000,
            ends: (prop::sample::Index, prop::sample::Index),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path().join("root");
            grow(&root, &steps);
            let mut expected = Vec::new();
            nix_nar::Encoder::new(&root).unwrap().read_to_end(&mut expected).unwrap();

            let layout = Arc::new(tree::lay_out(&root, None, || true).unwrap());
            prop_assert_eq!(layout.len(), expected.len() as u64);
            prop_assert!(read(&root, &layout, 0..layout.len(), chunk) == expected);
            prop_assert!(read_in_parts(&root, &layout, 0..layout.len(), chunk) == expected);
            let (one, other) = (ends.0.index(expected.len() + 1), ends.1.index(expected.len() + 1));
            let (start, end) = (one.min(other), one.max(other));
            prop_assert!(read(&root, &layout, start as u64..end as u64, chunk) == expected[start..end]);
            prop_assert!(read_in_parts(&root, &layout, start as u64..end as u64, chunk) == expected[start..end]);
        }
    }

    #[test]
    fn what_no_nar_can_hold_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        assert!(matches!(tree::lay_out(folder.path(), None, || true), Err(TreeError::Kind(_))));
        assert!(matches!(
            tree::lay_out(&folder.path().join("nothing"), None, || true),
            Err(TreeError::Io { .. })
        ));
    }

    #[test]
    fn a_file_that_can_not_be_opened_at_once_is_left_to_who_reads_on() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        symlink("target", root.join("a")).unwrap();
        std::fs::write(root.join("b"), vec![7; 5000]).unwrap();
        let layout = Arc::new(tree::lay_out(&root, None, || true).unwrap());
        let expected = read(&root, &layout, 0..layout.len(), 1000);
        std::fs::rename(root.join("b"), folder.path().join("away")).unwrap();
        let mut reader = NarReader::new(root.clone(), Arc::clone(&layout), 0..layout.len());
        let mut buffer = vec![0; expected.len()];
        let first = reader.fill_cached(&mut buffer, 1).unwrap();
        assert!(first > 100 && expected.starts_with(&buffer[..first]) && !reader.is_inside_file(1));
        assert_eq!(reader.fill_cached(&mut buffer[first..], 1).unwrap(), 0);
        // It is back when somebody looks who may wait.
        std::fs::rename(folder.path().join("away"), root.join("b")).unwrap();
        reader.fill(&mut buffer[first..]).unwrap();
        assert!(buffer == expected && reader.remaining() == 0);
    }

    #[test]
    fn few_files_that_make_many_bytes_are_quick_and_are_read_up_to_a_large_one() {
        let folder = folder_on_disk();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        for number in 0..MOST_FILES {
            std::fs::write(root.join(format!("a{number}")), vec![7; 1000]).unwrap();
        }
        std::fs::write(root.join("b"), vec![8; 100_000]).unwrap();
        let layout = Arc::new(tree::lay_out(&root, None, || true).unwrap());
        let mut reader = NarReader::new(root.clone(), Arc::clone(&layout), 0..layout.len());
        let small = MOST_FILES as u64 * 1000;
        assert!(reader.is_quick(small) && !reader.is_quick(small + 1));
        let mut buffer = vec![0; layout.len() as usize];
        let filled = reader.fill_cached(&mut buffer, 100_000).unwrap();
        assert!(filled as u64 > small && reader.is_inside_file(100_000));
        // It is read all the same if nobody else takes it.
        let more = reader.fill_cached(&mut buffer[filled..], 100_000).unwrap();
        assert_eq!((filled + more) as u64, layout.len());
        assert!(buffer == read(&root, &layout, 0..layout.len(), 1000));
        assert!(!NarReader::new(root, Arc::clone(&layout), 1..layout.len()).is_quick(1));
    }
}
