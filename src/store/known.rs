//! What is remembered of paths that were asked about, under the stamp of each.
//!
//! A path may be deleted and come back under its name with other contents, so nothing is believed without one look at
//! the path itself: device, inode and change time have to be what they were.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use moka::sync::Cache;

use super::leases::{Lease, LeaseMark};
use crate::nix::StorePathHash;
use crate::nix::narinfo::PathInfo;

/// Identity of what lies at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    changed: (i64, u64),
}

impl Stamp {
    /// One `lstat`. `None`: nothing is there, or it can't be seen.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let stat = rustix::fs::lstat(path).ok()?;
        let changed = (stat.st_ctime, stat.st_ctime_nsec);
        Some(Self { device: stat.st_dev, inode: stat.st_ino, changed })
    }
}

/// A path that was valid and leased when it was looked at, and what the store says of it.
#[derive(Debug)]
pub struct KnownPath {
    /// What the store says of it.
    pub info: PathInfo,
    /// Where it really lies.
    pub(super) real: PathBuf,
    pub(super) stamp: Stamp,
    pub(super) lease: LeaseMark,
    /// What the caller makes of the information (the signed narinfo): it lives and dies with it.
    derived: OnceLock<Bytes>,
    /// Held by who lays its tree out.
    pub(super) laying_out: tokio::sync::Mutex<()>,
}

impl KnownPath {
    pub(super) fn new(info: PathInfo, real: PathBuf, stamp: Stamp, lease: LeaseMark) -> Self {
        Self { info, real, stamp, lease, derived: OnceLock::new(), laying_out: tokio::sync::Mutex::default() }
    }

    /// What `make` makes of the information, made once.
    pub fn derived<E>(&self, make: impl FnOnce(&PathInfo) -> Result<Bytes, E>) -> Result<Bytes, E> {
        if let Some(made) = self.derived.get() {
            return Ok(made.clone());
        }
        let made = make(&self.info)?;
        Ok(self.derived.get_or_init(|| made).clone())
    }

    /// Takes over what was derived from the same information before: signing costs more than comparing.
    pub(super) fn take_over_from(&self, before: &Self) {
        if let (true, Some(derived)) = (before.info == self.info, before.derived.get()) {
            let _ = self.derived.set(derived.clone());
        }
    }

    /// Keeps the path from garbage collection, unless the process that could is gone.
    #[must_use]
    pub fn lease(&self) -> Option<Lease> {
        self.lease.lease()
    }

    /// Whether what lies at the path is still the same.
    pub(super) fn is_unchanged(&self) -> bool {
        Stamp::of(&self.real) == Some(self.stamp)
    }

    /// Whether Nix is building, fetching or repairing it.
    pub(super) fn is_locked(&self) -> bool {
        let mut lock = self.real.clone().into_os_string();
        lock.push(".lock");
        Stamp::of(Path::new(&lock)).is_some()
    }
}

/// Paths that were asked about; bounded by memory, the least used go first.
#[derive(Debug)]
pub(super) struct KnownPaths(Cache<StorePathHash, Arc<KnownPath>>);

impl KnownPaths {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        let weigh = |_: &StorePathHash, known: &Arc<KnownPath>| {
            // Twice the information: the text that is derived from it is about as long.
            let bytes = known.info.weight() * 2 + known.real.as_os_str().len() + 256;
            u32::try_from(bytes).unwrap_or(u32::MAX)
        };
        Self(Cache::builder().weigher(weigh).max_capacity(capacity_bytes).build())
    }

    pub(super) fn get(&self, hash: &StorePathHash) -> Option<Arc<KnownPath>> {
        self.0.get(hash)
    }

    pub(super) fn insert(&self, known: Arc<KnownPath>) {
        self.0.insert(known.info.hash(), known);
    }

    pub(super) fn forget(&self, hash: &StorePathHash) {
        // Most were never known: looking costs less than removing.
        if self.0.contains_key(hash) {
            self.0.invalidate(hash);
        }
    }
}
