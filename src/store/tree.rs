//! From a tree on disk to the layout of its NAR. Blocking: call it where that is allowed.
//!
//! Reads metadata, and the files as well where the head of the NAR is wanted. What no NAR can hold (devices, sockets, pipes) is an
//! error, as it is for Nix.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};

use super::in_order::in_order;
use super::nar_head::NarHead;
use super::open_directory::file_meta;
use super::tree_error::TreeError;
use super::tree_part::{MOST_BYTES, ReadPart, TreePart};
use crate::nix::layout::{LayoutBuilder, LayoutError, MAX_ENTRIES, NarLayout};

/// So many files make a part of a tree; fewer are done sooner than another thread is woken.
const PART: usize = 64;
/// So many buffers are kept for parts to come.
const BUFFERS: usize = 12;
/// Bytes that a part has room for from the beginning: to grow is to be copied into fresh memory.
const BUFFER: usize = 256 * 1024;
/// Bytes for the names of a directory: so many come with one call.
const NAMES: usize = 32 * 1024;
/// As how many files a directory counts, which has to be opened.
const DIRECTORY: usize = 4;

/// Lays out the tree at `root` if it is a file, at the cost of one `lstat`: not blocking where that was just done.
pub(super) fn lay_out_file(root: &Path) -> Option<NarLayout> {
    let stat = rustix::fs::lstat(root).ok()?;
    let mut builder = LayoutBuilder::default();
    builder.file(b"", file_meta(&stat)?).ok()?;
    builder.finish().ok()
}

/// Lays out the tree at `root`, which may be a directory, a file or a symbolic link, unless that is not wanted any more. Writes the
/// head of its NAR meanwhile, as far as the head takes it.
pub(super) fn lay_out(
    root: &Path,
    mut head: Option<&mut NarHead>,
    is_wanted: impl Fn() -> bool,
) -> Result<NarLayout, TreeError> {
    let stat = rustix::fs::lstat(root).map_err(TreeError::io(root))?;
    let layout = |source| TreeError::Layout { path: root.to_owned(), source };
    let mut builder = LayoutBuilder::default();
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {}
        FileType::RegularFile => {
            let meta = file_meta(&stat).ok_or_else(|| TreeError::Changed(root.to_owned()))?;
            builder.file(b"", meta).map_err(layout)?;
            return builder.finish().map_err(layout);
        }
        FileType::Symlink => {
            let target = rustix::fs::readlink(root, Vec::new()).map_err(TreeError::io(root))?;
            builder.symlink(b"", target.as_bytes()).map_err(layout)?;
            return builder.finish().map_err(layout);
        }
        _ => return Err(TreeError::Kind(root.to_owned())),
    }
    let (until, is_read) = (head.as_ref().map(|head| head.until()), AtomicBool::new(head.is_some()));
    // Buffers that come back. The latest is taken first: it is the likeliest to be in a processor's cache, and few are made.
    let buffers = Mutex::new(Vec::new());
    let spare = || buffers.lock().unwrap_or_else(PoisonError::into_inner);
    let read = |part: TreePart| {
        let until = until.filter(|_| is_read.load(Ordering::Relaxed));
        part.read(
            root,
            until.map(|until| (spare().pop().unwrap_or_else(|| Vec::with_capacity(BUFFER)), until)),
        )
    };
    let take = |part: Result<ReadPart, TreeError>| {
        let part = part?;
        part.lay_out(&mut builder).map_err(layout)?;
        let entries = part.len();
        let goes_on = match (&mut head, part.nar) {
            (Some(head), Some(nar)) => head.put(nar, entries),
            _ => false,
        };
        if !goes_on {
            head = None;
            is_read.store(false, Ordering::Relaxed);
            spare().clear();
        }
        while let Some(mut nar) = head.as_mut().and_then(|head| head.spare_buffer()) {
            nar.clear();
            let mut spare = spare();
            if spare.len() < BUFFERS && nar.capacity() <= MOST_BYTES {
                spare.push(nar);
            }
        }
        Ok(())
    };
    let unwanted = || Some(Err(TreeError::Unwanted(root.to_owned())));
    let mut parts = Parts::new(root);
    in_order(std::iter::from_fn(|| if is_wanted() { parts.next() } else { unwanted() }), read, take)?;
    builder.finish().map_err(layout)
}

/// The parts of a tree, in their order. A directory is read when its entries are due.
struct Parts {
    place: PathBuf,
    /// The directories that are not done, the innermost last, behind one that has the root alone.
    open: Vec<DirectoryEntries>,
    /// For what the kernel says of a directory.
    buffer: Vec<u8>,
}

impl Parts {
    fn new(root: &Path) -> Self {
        let mut first = DirectoryEntries::default();
        first.push(b"", FileType::Directory);
        Self { place: root.to_owned(), open: vec![first], buffer: Vec::with_capacity(NAMES) }
    }
}

impl Iterator for Parts {
    type Item = Result<TreePart, TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut part = TreePart::new(self.place.clone(), self.open.len().saturating_sub(1));
        let mut weight = 0;
        while weight < PART
            && let Some(names) = self.open.last_mut()
        {
            match names.next() {
                Some((name, FileType::Directory)) => {
                    weight += DIRECTORY;
                    part.enter(name);
                    if !name.is_empty() {
                        self.place.push(OsStr::from_bytes(name));
                    }
                    match DirectoryEntries::read(&self.place, &mut self.buffer) {
                        Ok(names) => self.open.push(names),
                        Err(error) => return Some(Err(error)),
                    }
                }
                Some((name, kind)) => {
                    weight += 1;
                    part.leaf(name, kind);
                }
                None => {
                    self.open.pop();
                    if !self.open.is_empty() {
                        part.leave();
                    }
                    if self.open.len() > 1 {
                        self.place.pop();
                    }
                }
            }
        }
        (!part.is_empty()).then_some(Ok(part))
    }
}

/// The entries of a directory that are still to come: their names, and their kinds.
#[derive(Default)]
struct DirectoryEntries {
    /// The last one comes next.
    entries: Vec<(Range<usize>, FileType)>,
    text: Vec<u8>,
}

impl DirectoryEntries {
    /// All of a directory, in the order of their bytes.
    fn read(directory: &Path, buffer: &mut Vec<u8>) -> Result<Self, TreeError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(directory, flags, Mode::empty()).map_err(TreeError::io(directory))?;
        let mut names = Self::default();
        let mut dir = RawDir::new(&fd, buffer.spare_capacity_mut());
        while let Some(entry) = dir.next() {
            let entry = entry.map_err(TreeError::io(directory))?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                // Some file systems don't say.
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW);
                    let path = directory.join(OsStr::from_bytes(name));
                    FileType::from_raw_mode(stat.map_err(TreeError::io(&path))?.st_mode)
                }
                kind => kind,
            };
            if !matches!(kind, FileType::Directory | FileType::RegularFile | FileType::Symlink) {
                return Err(TreeError::Kind(directory.join(OsStr::from_bytes(name))));
            }
            if names.entries.len() >= MAX_ENTRIES {
                return Err(TreeError::Layout { path: directory.to_owned(), source: LayoutError::TooLarge });
            }
            names.push(name, kind);
        }
        let Self { entries, text } = &mut names;
        entries.sort_unstable_by(|(one, _), (other, _)| text[other.clone()].cmp(&text[one.clone()]));
        Ok(names)
    }

    fn push(&mut self, name: &[u8], kind: FileType) {
        let at = self.text.len();
        self.text.extend_from_slice(name);
        self.entries.push((at..self.text.len(), kind));
    }

    fn next(&mut self) -> Option<(&[u8], FileType)> {
        let (name, kind) = self.entries.pop()?;
        Some((&self.text[name], kind))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::sync::Arc;

    use prometheus_client::metrics::gauge::Gauge;

    use super::super::copy_file::{CopyFile, Leave, Room};
    use super::super::nar_head::Head;
    use super::super::nar_reader::NarReader;
    use super::*;

    /// A tree of many parts: files of up to `largest` bytes, links and directories, some of them empty, wide and deep.
    fn grow(root: &Path, largest: usize) {
        for number in 0..1500_usize {
            let mut place = root.join(format!("d{}", number % 23));
            for level in 0..number % 6 {
                place.push(format!("level-{level}"));
            }
            if number % 41 == 0 {
                place.push("nothing");
            }
            std::fs::create_dir_all(&place).unwrap();
            match number % 41 {
                0 => {}
                1 => std::os::unix::fs::symlink(format!("../f{number}"), place.join(format!("l{number}")))
                    .unwrap(),
                _ => std::fs::write(place.join(format!("f{number}")), vec![b'x'; number * 7919 % largest])
                    .unwrap(),
            }
        }
    }

    fn nar(root: &Path) -> Vec<u8> {
        let mut nar = Vec::new();
        nix_nar::Encoder::new(root).unwrap().read_to_end(&mut nar).unwrap();
        nar
    }

    /// The tree laid out with a head that has room for so many bytes, and what the head has.
    fn with_head(root: &Path, room_bytes: u64) -> (Arc<NarLayout>, Option<Head>) {
        let (folder, room) = (root.parent().unwrap().to_owned(), Room::of_a_test(0, &Gauge::default()));
        let make = Box::new(move || Some((CopyFile::make(&folder, room).ok()?, Leave::of_a_test())));
        let mut head = NarHead::new(room_bytes, make).patient();
        (Arc::new(lay_out(root, Some(&mut head), || true).unwrap()), head.end())
    }

    /// What the head has, and what it has not as it is read by the layout.
    fn head_and_rest(root: &Path, room_bytes: u64) -> (usize, Vec<u8>) {
        let (layout, head) = with_head(root, room_bytes);
        let Head { file, len, .. } = head.unwrap();
        let mut nar = vec![0; layout.len() as usize];
        let (head, rest) = nar.split_at_mut(len as usize);
        file.read_exact_at(head, 0).unwrap();
        let mut reader = NarReader::new(root.to_owned(), Arc::clone(&layout), len..layout.len());
        assert_eq!(reader.fill(rest).unwrap(), rest.len());
        (len as usize, nar)
    }

    #[test]
    fn the_head_of_a_nar_is_what_another_writer_of_nars_says_and_its_rest_follows_from_the_layout() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        grow(&root, 9000);
        let expected = nar(&root);
        let (len, written) = head_and_rest(&root, expected.len() as u64);
        assert!(len == expected.len() && written == expected);
        assert_eq!(lay_out(&root, None, || true).unwrap().len(), expected.len() as u64);
        // It takes no more than it has room for, whatever the tree has come to.
        for room in [expected.len() as u64 / 2, expected.len() as u64 - 1] {
            let (len, written) = head_and_rest(&root, room);
            assert!((1..=room).contains(&(len as u64)) && written == expected);
        }
        assert!(with_head(&root, 1000).1.is_none());
    }

    #[test]
    fn names_may_be_any_bytes_and_more_than_come_with_one_call() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        assert!(with_head(&root, 1000).0.len() == nar(&root).len() as u64);
        for number in 0..600_usize {
            let mut name = [0x80 | (number * 37 % 128) as u8; 255];
            name[..4].copy_from_slice(format!("{number:04}").as_bytes());
            // Beside a directory whose name is the beginning of others.
            let name = match number {
                0..4 => [&b"a"[..], b"a-b", b"a.b", b"a0"][number],
                _ => &name,
            };
            let path = root.join(OsStr::from_bytes(name));
            if number == 0 { std::fs::create_dir(path) } else { std::fs::write(path, name) }.unwrap();
        }
        std::fs::write(root.join("a/c"), "c").unwrap();
        // The other writer of NARs knows UTF-8 alone.
        let nix = std::process::Command::new("nix-store").arg("--dump").arg(&root).output().unwrap();
        let (len, written) = head_and_rest(&root, nix.stdout.len() as u64);
        assert!(nix.status.success() && len == written.len() && written == nix.stdout);
    }

    #[test]
    fn a_long_file_ends_the_head_and_large_ones_have_none() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        grow(&root, 9000);
        let long = root.join("d5/level-0/long");
        std::fs::write(&long, vec![b'y'; 3_000_000]).unwrap();
        let expected = nar(&root);
        let (len, written) = head_and_rest(&root, expected.len() as u64);
        assert!(written == expected);
        let behind = expected.windows(8).position(|bytes| bytes == b"yyyyyyyy").unwrap();
        assert!((1..behind).contains(&len), "{len} of {behind}");

        // As many as a part has bytes for.
        for (size, has_head) in [(15_000, true), (17_000, false)] {
            let same = folder.path().join(format!("of-{size}"));
            std::fs::create_dir(&same).unwrap();
            for number in 0..70 {
                std::fs::write(same.join(format!("f{number}")), vec![b'x'; size]).unwrap();
            }
            let (layout, head) = with_head(&same, u64::MAX);
            assert_eq!((layout.len(), head.is_some()), (nar(&same).len() as u64, has_head));
        }
    }

    #[test]
    fn a_tree_that_nobody_wants_any_more_is_not_read_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        grow(folder.path(), 10);
        let asked = std::cell::Cell::new(0);
        let is_wanted = || asked.replace(asked.get() + 1) < 3;
        assert!(matches!(lay_out(folder.path(), None, is_wanted), Err(TreeError::Unwanted(_))));
        assert_eq!(asked.get(), 4);
    }
}
