//! The directory of a tree that a NAR is being read from, and the way to the files in it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use super::nar_read_error::NarReadError;
use super::tree::file_meta;
use crate::nix::layout::FileMeta;

/// The directory that the cursor is in. Opened when a file in it is; one descriptor however deep the tree.
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

    /// Opens a file of this directory, or the root itself if that is a file, and checks that it is what it was.
    pub(super) fn open(
        &mut self,
        name: &[u8],
        meta: FileMeta,
        how: ResolveFlags,
    ) -> Result<OwnedFd, NarReadError> {
        // Joining an empty name would leave a slash behind.
        let path = |directory: &Path| match name {
            b"" => directory.to_owned(),
            name => directory.join(OsStr::from_bytes(name)),
        };
        let io = |source| NarReadError::Io { path: path(&self.path), source };
        // A pipe in the place of a file would block the open itself.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = if name.is_empty() {
            open_at(rustix::fs::CWD, &self.path, flags, how).map_err(io)?
        } else {
            let directory = match &self.fd {
                Some(fd) => fd,
                None => {
                    let flags = flags | OFlags::DIRECTORY;
                    let fd = open_at(rustix::fs::CWD, &self.path, flags, how).map_err(io)?;
                    self.fd.insert(fd)
                }
            };
            open_at(directory, Path::new(OsStr::from_bytes(name)), flags, how).map_err(io)?
        };
        let stat = rustix::fs::fstat(&fd).map_err(io)?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !regular || file_meta(&stat) != meta {
            return Err(NarReadError::Changed(path(&self.path)));
        }
        Ok(fd)
    }
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
