//! A part of a tree, some of its entries in the order of a NAR: looked at, or read into the bytes of their NAR.
//!
//! Reading a file tells the same as looking at it. So a tree of many small files is read while it is laid out, where that is
//! wanted, and each of them is found once instead of twice.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::buffer::spare_capacity;
use rustix::fs::{FileType, ResolveFlags};
use rustix::io::Errno;

use super::open_directory::{OpenDirectory, file_meta};
use super::tree_error::TreeError;
use crate::nix::layout::{FileMeta, LayoutBuilder, LayoutError};
use crate::nix::nar_text::NarText;

/// A part that would have more bytes than this is only looked at. A dozen of them may wait for their turn in one tree, and as many, all but
/// one of them short, to be written; a buffer that grew may be twice as long.
pub(super) const MOST_BYTES: usize = 1024 * 1024;

/// An entry, and how long its name is. Its directory tells both.
#[derive(Debug)]
enum Entry {
    /// The root has the empty name.
    Enter(usize),
    Leave,
    /// A file or a symbolic link.
    Leaf(usize, FileType),
}

/// Entries that follow each other.
#[derive(Debug)]
pub(super) struct TreePart {
    /// The directory that the first of them is in, or the root where that is the first, and how deep it lies.
    place: PathBuf,
    depth: usize,
    entries: Vec<Entry>,
    /// Their names, one behind the other: to keep each by itself is what many small files cost first.
    names: Vec<u8>,
}

/// What a part came to.
#[derive(Debug)]
pub(super) struct ReadPart {
    /// With the lengths of their names.
    entries: Vec<(usize, Known)>,
    names: Vec<u8>,
    /// The bytes of all of it, if it was read.
    pub(super) nar: Option<Vec<u8>>,
}

/// What is known of an entry after a look.
#[derive(Debug)]
enum Known {
    Directory,
    End,
    File(FileMeta),
    Symlink(Vec<u8>),
}

impl TreePart {
    /// A part that begins in the directory at `place`, so deep in the tree, and has no entries yet.
    pub(super) fn new(place: PathBuf, depth: usize) -> Self {
        Self { place, depth, entries: Vec::new(), names: Vec::new() }
    }

    pub(super) fn enter(&mut self, name: &[u8]) {
        self.names.extend_from_slice(name);
        self.entries.push(Entry::Enter(name.len()));
    }

    pub(super) fn leave(&mut self) {
        self.entries.push(Entry::Leave);
    }

    /// A file or a symbolic link.
    pub(super) fn leaf(&mut self, name: &[u8], kind: FileType) {
        self.names.extend_from_slice(name);
        self.entries.push(Entry::Leaf(name.len(), kind));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Looks at each entry. With a buffer, which has to be empty, each file is read as well, unless something is in the way of that, or
    /// it takes until then.
    pub(super) fn read(self, root: &Path, buffer: Option<(Vec<u8>, Instant)>) -> Result<ReadPart, TreeError> {
        let mut directory = OpenDirectory::new(self.place);
        let mut text = NarText::at_depth(self.depth);
        let mut names = &self.names[..];
        let mut entries = Vec::with_capacity(self.entries.len());
        let (mut nar, until) = buffer.unzip();
        let is_late = || until.is_some_and(|until| Instant::now() > until);
        for entry in self.entries {
            entries.push(match entry {
                Entry::Enter(len) => {
                    let name = take(&mut names, len);
                    directory.enter(name);
                    if let Some(nar) = &mut nar {
                        text.directory(name, nar);
                    }
                    (len, Known::Directory)
                }
                Entry::Leave => {
                    directory.leave(root);
                    if let Some(nar) = &mut nar {
                        text.end(nar);
                    }
                    (0, Known::End)
                }
                Entry::Leaf(len, FileType::Symlink) => {
                    let name = take(&mut names, len);
                    let target = directory.link(name).map_err(|source| io(&directory, name, source))?;
                    if let Some(nar) = &mut nar {
                        text.symlink(name, &target, nar);
                    }
                    (len, Known::Symlink(target))
                }
                Entry::Leaf(len, _) => {
                    let name = take(&mut names, len);
                    let buffer = nar.as_mut().filter(|_| !is_late());
                    let read = buffer.and_then(|nar| read_file(&mut directory, name, text, nar));
                    let meta = match read {
                        Some(meta) => meta,
                        None => {
                            // Whatever it was: a look says so, or who reads it later.
                            nar = None;
                            look_at(&mut directory, name)?
                        }
                    };
                    (len, Known::File(meta))
                }
            });
        }
        Ok(ReadPart { entries, names: self.names, nar })
    }
}

impl ReadPart {
    /// How many entries it has; the ends of directories count too.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Lays it out behind what was laid out before.
    pub(super) fn lay_out(&self, builder: &mut LayoutBuilder) -> Result<(), LayoutError> {
        let mut names = &self.names[..];
        self.entries.iter().try_for_each(|(len, known)| {
            let name = take(&mut names, *len);
            match known {
                Known::Directory => builder.directory(name),
                Known::End => builder.end(),
                Known::File(meta) => builder.file(name, *meta),
                Known::Symlink(target) => builder.symlink(name, target),
            }
        })
    }
}

/// The name that comes next.
fn take<'a>(names: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (name, rest) = names.split_at(len);
    *names = rest;
    name
}

fn look_at(directory: &mut OpenDirectory, name: &[u8]) -> Result<FileMeta, TreeError> {
    let stat = directory.look_at(name).map_err(|source| io(directory, name, source))?;
    file_meta(&stat).ok_or_else(|| TreeError::Changed(directory.path_of(name)))
}

fn io(directory: &OpenDirectory, name: &[u8], source: Errno) -> TreeError {
    TreeError::Io { path: directory.path_of(name), source }
}

/// Appends a file to a NAR. `None`: it is too long for here, or can't be read; what was appended is of no use then.
fn read_file(
    directory: &mut OpenDirectory,
    name: &[u8],
    text: NarText,
    nar: &mut Vec<u8>,
) -> Option<FileMeta> {
    let (fd, meta) = directory.open_file(name, ResolveFlags::empty()).ok()?;
    let meta = meta?;
    let size = usize::try_from(meta.size).ok().filter(|size| nar.len() + size <= MOST_BYTES)?;
    text.file(name, meta.size, meta.executable, nar);
    if size > 0 {
        read_whole(&fd, size, nar)?;
    }
    text.file_end(meta.size, nar);
    Some(meta)
}

/// `None`: it is longer or shorter than it was, or can't be read at once.
fn read_whole(fd: &OwnedFd, size: usize, out: &mut Vec<u8>) -> Option<()> {
    out.reserve(size);
    let before = out.len();
    rustix::io::pread(fd, spare_capacity(out), 0).ok()?;
    (out.len() - before == size).then_some(())
}
