//! The directory of a tree that a NAR is being read from, and the way to what is in it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::nar_read_error::NarReadError;
use crate::nix::layout::FileMeta;

/// A pipe in the place of a file would block the open itself.
const FLAGS: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// The directory that the cursor is in. Opened when an entry of it is needed; one descriptor however deep the tree.
#[derive(Debug)]
pub(super) struct OpenDirectory {
    path: PathBuf,
    fd: Option<OwnedFd>,
}

impl OpenDirectory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, fd: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn enter(&mut self, name: &[u8]) {
        if !name.is_empty() {
            self.path.push(OsStr::from_bytes(name));
        }
        self.fd = None;
    }

    pub(super) fn leave(&mut self, root: &Path) {
        if self.path != root {
            self.path.pop();
        }
        self.fd = None;
    }

    /// Where an entry of it lies; it lies here itself if the name is empty.
    pub(super) fn path_of(&self, name: &[u8]) -> PathBuf {
        match name {
            // Joining it would leave a slash behind.
            b"" => self.path.clone(),
            name => self.path.join(OsStr::from_bytes(name)),
        }
    }

    /// Opens a file of this directory, or the root itself if that is a file, and checks that it is what it was.
    pub(super) fn open(
        &mut self,
        name: &[u8],
        meta: FileMeta,
        how: ResolveFlags,
    ) -> Result<OwnedFd, NarReadError> {
        match self.open_file(name, how) {
            Ok((fd, Some(found))) if found == meta => Ok(fd),
            Ok(_) => Err(NarReadError::Changed(self.path_of(name))),
            Err(source) => Err(NarReadError::Io { path: self.path_of(name), source }),
        }
    }

    /// Opens a file of this directory, or the root itself if that is one, and says what it is: `None` is no regular file.
    pub(super) fn open_file(
        &mut self,
        name: &[u8],
        how: ResolveFlags,
    ) -> Result<(OwnedFd, Option<FileMeta>), Errno> {
        let fd = if name.is_empty() {
            open_at(rustix::fs::CWD, &self.path, FLAGS, how)?
        } else {
            open_at(self.fd(how)?, Path::new(OsStr::from_bytes(name)), FLAGS, how)?
        };
        let stat = rustix::fs::fstat(&fd)?;
        Ok((fd, file_meta(&stat)))
    }

    /// What an entry of this directory is, without a look at what a link points to.
    pub(super) fn look_at(&mut self, name: &[u8]) -> Result<Stat, Errno> {
        let directory = self.fd(ResolveFlags::empty())?;
        rustix::fs::statat(directory, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// What a symbolic link of this directory points to.
    pub(super) fn link(&mut self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let directory = self.fd(ResolveFlags::empty())?;
        Ok(rustix::fs::readlinkat(directory, OsStr::from_bytes(name), Vec::new())?.into_bytes())
    }

    fn fd(&mut self, how: ResolveFlags) -> Result<&OwnedFd, Errno> {
        let fd = match self.fd.take() {
            Some(fd) => fd,
            None => open_at(rustix::fs::CWD, &self.path, FLAGS | OFlags::DIRECTORY, how)?,
        };
        Ok(self.fd.insert(fd))
    }
}

/// What a layout keeps of a regular file; `None` is something else.
pub(super) fn file_meta(stat: &Stat) -> Option<FileMeta> {
    let nanoseconds = stat.st_mtime.wrapping_mul(1_000_000_000).wrapping_add_unsigned(stat.st_mtime_nsec);
    let meta = FileMeta {
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        executable: stat.st_mode & 0o100 != 0,
        modified_ns: nanoseconds,
    };
    (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(meta)
}

/// A kernel that does not know how, or a sandbox that forbids it, is an error: only the plain way is always there.
fn open_at(
    directory: impl AsFd,
    path: &Path,
    flags: OFlags,
    how: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    if how.is_empty() {
        return rustix::fs::openat(directory, path, flags, Mode::empty());
    }
    rustix::fs::openat2(directory, path, flags, Mode::empty(), how)
}
