//! From a tree on disk to the layout of its NAR. Blocking: call it where that is allowed.
//!
//! Reads metadata only. What no NAR can hold (devices, sockets, pipes) is an error, as it is for Nix.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use thiserror::Error;

use crate::nix::layout::{FileMeta, LayoutBuilder, LayoutError, NarLayout};

/// Why a tree can't be laid out.
#[derive(Debug, Error)]
pub enum TreeError {
    /// The system refuses; a path that is being deleted shows as missing here.
    #[error("{path}: {source}")]
    Io {
        /// What was read.
        path: PathBuf,
        /// What the system says.
        source: rustix::io::Errno,
    },
    /// A device, socket or pipe.
    #[error("{0}: a NAR holds files, directories and symbolic links only")]
    Kind(PathBuf),
    /// The layout refuses it.
    #[error("{path}: {source}")]
    Layout {
        /// Where.
        path: PathBuf,
        /// Why.
        source: LayoutError,
    },
}

/// From so many directories in one on, they are read at the same time: fewer would not pay for the threads.
const MANY: usize = 32;
const MOST_THREADS: usize = 4;
/// A thread takes so many directories at a time.
const SHARE: usize = 8;

/// One entry that waits for its turn.
enum Pending {
    Entry(Vec<u8>, Kind),
    /// All entries of the innermost directory are done.
    End,
}

enum Kind {
    /// With its entries, if they were read ahead.
    Directory(Option<Vec<Pending>>),
    File(FileMeta),
    Symlink(Vec<u8>),
}

/// Lays out the tree at `root` if it is a file, at the cost of one `lstat`: not blocking where that was just done.
pub(super) fn lay_out_file(root: &Path) -> Option<NarLayout> {
    let stat = rustix::fs::lstat(root).ok()?;
    let mut builder = LayoutBuilder::default();
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    builder.file(b"", is_file.then(|| file_meta(&stat))?).ok()?;
    builder.finish().ok()
}

/// Lays out the tree at `root`, which may be a directory, a file or a symbolic link.
pub(super) fn lay_out(root: &Path) -> Result<NarLayout, TreeError> {
    let mut builder = LayoutBuilder::default();
    let mut place = root.to_owned();
    let stat = rustix::fs::lstat(root).map_err(|source| io(root, source))?;
    let kind = kind(&stat, rustix::fs::CWD, root.as_os_str(), root)?;
    let mut pending = vec![Pending::Entry(Vec::new(), kind)];
    while let Some(next) = pending.pop() {
        let laid = match next {
            Pending::Entry(name, Kind::Directory(read)) => {
                if !name.is_empty() {
                    place.push(OsStr::from_bytes(&name));
                }
                pending.push(Pending::End);
                let mut entries = read.map_or_else(|| entries(&place), Ok)?;
                read_ahead(&mut entries, &place)?;
                // The last one pushed is the first to have its turn.
                pending.extend(entries.into_iter().rev());
                builder.directory(&name)
            }
            Pending::Entry(name, Kind::File(meta)) => builder.file(&name, meta),
            Pending::Entry(name, Kind::Symlink(target)) => builder.symlink(&name, &target),
            Pending::End => {
                if place != root {
                    place.pop();
                }
                builder.end()
            }
        };
        laid.map_err(|source| TreeError::Layout { path: place.clone(), source })?;
    }
    builder.finish().map_err(|source| TreeError::Layout { path: root.to_owned(), source })
}

/// Reads the directories among the entries, where they are many, on all processors.
fn read_ahead(found: &mut [Pending], place: &Path) -> Result<(), TreeError> {
    let mut directories: Vec<(PathBuf, &mut Option<Vec<Pending>>)> = Vec::new();
    for entry in found {
        if let Pending::Entry(name, Kind::Directory(read @ None)) = entry {
            directories.push((place.join(OsStr::from_bytes(name)), read));
        }
    }
    if directories.len() < MANY {
        return Ok(());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    on_threads(threads, &mut directories, |(path, read)| entries(path).map(|found| **read = Some(found)))
}

/// Does each item, on at most so many threads, this one among them. Whatever the system refuses to start, the others do.
fn on_threads<T: Send>(
    threads: usize,
    items: &mut [T],
    work: impl Fn(&mut T) -> Result<(), TreeError> + Sync,
) -> Result<(), TreeError> {
    let shares = Mutex::new(items.chunks_mut(SHARE));
    let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || std::iter::from_fn(next).flatten().try_for_each(&work);
    std::thread::scope(|scope| {
        let others = (1..threads).map_while(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok());
        // Collected: all are to begin before this one does.
        let others: Vec<_> = others.collect();
        let mut done = work();
        for other in others {
            // It does not panic; if it did, nothing would be read ahead.
            done = done.and(other.join().unwrap_or(Ok(())));
        }
        done
    })
}

/// The entries of a directory, sorted by the bytes of their names.
fn entries(directory: &Path) -> Result<Vec<Pending>, TreeError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty()).map_err(|e| io(directory, e))?;
    let mut names: Vec<(Vec<u8>, FileType)> = Vec::new();
    let mut dir = Dir::read_from(&fd).map_err(|source| io(directory, source))?;
    while let Some(entry) = dir.read() {
        let entry = entry.map_err(|source| io(directory, source))?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            names.push((name.to_vec(), entry.file_type()));
        }
    }
    names.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    let entry = |(name, file_type): (Vec<u8>, FileType)| {
        // The type that the directory tells spares a stat of everything but files.
        let kind = match file_type {
            FileType::Directory => Kind::Directory(None),
            FileType::Symlink => link(&fd, &name, directory)?,
            _ => {
                let os_name = OsStr::from_bytes(&name);
                let stat = rustix::fs::statat(&fd, os_name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|source| io(&directory.join(os_name), source))?;
                self::kind(&stat, &fd, os_name, &directory.join(os_name))?
            }
        };
        Ok(Pending::Entry(name, kind))
    };
    names.into_iter().map(entry).collect()
}

fn link(fd: impl std::os::fd::AsFd, name: &[u8], directory: &Path) -> Result<Kind, TreeError> {
    let name = OsStr::from_bytes(name);
    let target =
        rustix::fs::readlinkat(fd, name, Vec::new()).map_err(|source| io(&directory.join(name), source))?;
    Ok(Kind::Symlink(target.into_bytes()))
}

fn kind(stat: &Stat, fd: impl std::os::fd::AsFd, name: &OsStr, path: &Path) -> Result<Kind, TreeError> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Ok(Kind::Directory(None)),
        FileType::RegularFile => Ok(Kind::File(file_meta(stat))),
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(fd, name, Vec::new()).map_err(|source| io(path, source))?;
            Ok(Kind::Symlink(target.into_bytes()))
        }
        _ => Err(TreeError::Kind(path.to_owned())),
    }
}

/// What a layout keeps of a regular file.
pub(super) fn file_meta(stat: &Stat) -> FileMeta {
    let nanoseconds = stat.st_mtime.wrapping_mul(1_000_000_000).wrapping_add_unsigned(stat.st_mtime_nsec);
    FileMeta {
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        executable: stat.st_mode & 0o100 != 0,
        modified_ns: nanoseconds,
    }
}

fn io(path: &Path, source: rustix::io::Errno) -> TreeError {
    TreeError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_on_however_many_threads() {
        for threads in [1, 2, 7] {
            let mut items = vec![0; 1000];
            let work = |item: &mut i32| {
                *item += 1;
                Ok(())
            };
            on_threads(threads, &mut items, work).unwrap();
            assert!(items.iter().all(|item| *item == 1), "{threads}");
        }
        let fails = |item: &mut i32| match *item {
            77 => Err(TreeError::Kind(PathBuf::new())),
            _ => Ok(()),
        };
        let mut items: Vec<i32> = (0..100).collect();
        assert!(on_threads(2, &mut items, fails).is_err());
    }
}
