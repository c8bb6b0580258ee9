//! What a name in the store directory is.

use std::ffi::CStr;
use std::path::Path;

use rustix::fs::{FileType, Mode, Stat};

use crate::nix::{StorePath, StorePathHash};

/// `.links`, temporary files and the like are no store paths.
pub(super) fn store_path(name: &CStr) -> Option<StorePath> {
    StorePath::from_basename(name.to_bytes()).ok()
}

/// The store path with this hash part and name, if it may have that name.
pub(super) fn path_named(hash: &StorePathHash, name: &[u8]) -> Option<StorePath> {
    StorePath::from_parts(*hash.as_bytes(), std::str::from_utf8(name).ok()?).ok()
}

/// Whether Nix locks a path by this name, which it has while that is made, and sometimes longer.
pub(super) fn is_lock(path: &StorePath) -> bool {
    path.name().ends_with(".lock")
}

/// Whether what lies there is the lock of a path, and not a path that is named so: Nix writes locks, and no file of a path can be
/// written.
pub(super) fn is_lock_file(path: &StorePath, real: &Path) -> bool {
    // Links have all permissions, and one that is gone was a lock.
    let may_be_written = |stat: Stat| {
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        is_file && Mode::from_raw_mode(stat.st_mode).intersects(Mode::WUSR)
    };
    is_lock(path) && rustix::fs::lstat(real).map_or(true, may_be_written)
}
