//! The file of a copy of a NAR, and what it takes to write one.

use std::fs::File;
use std::io::{ErrorKind, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use prometheus_client::metrics::gauge::Gauge;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use tokio::sync::OwnedSemaphorePermit;

use super::leases::Lease;

/// All copies together take one part in so many of what the disk would have free without them, at most: builds need room as well.
const SHARE_OF_FREE: u64 = 10;

/// Leave to write a copy: a place among those who do, and the lease that keeps its path meanwhile.
#[derive(Debug)]
pub(super) struct Leave {
    _place: OwnedSemaphorePermit,
    _lease: Lease,
}

impl Leave {
    pub(super) fn new(place: OwnedSemaphorePermit, lease: Lease) -> Self {
        Self { _place: place, _lease: lease }
    }
}

/// Room on the disk, taken until this is dropped.
#[derive(Debug)]
pub(super) struct Room {
    bytes: i64,
    taken: Gauge,
    _permit: OwnedSemaphorePermit,
}

impl Room {
    /// Of so many bytes, counted in the gauge.
    pub(super) fn new(bytes: u64, permit: OwnedSemaphorePermit, taken: Gauge) -> Self {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        taken.inc_by(bytes);
        Self { bytes, taken, _permit: permit }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.taken.dec_by(self.bytes);
    }
}

/// Why there is no file for a copy.
#[derive(Debug)]
pub(super) enum NoFile {
    /// With this one, copies would take too much of what the disk has free.
    TooLong,
    /// None can be made. Why was said.
    Failed,
}

/// A file without a name, and its room: both go when the last who reads or writes it does.
#[derive(Debug)]
pub(super) struct CopyFile {
    file: File,
    _room: Room,
}

impl CopyFile {
    /// Makes one in that folder. Blocking.
    pub(super) fn make(folder: &Path, room: Room) -> Result<Self, NoFile> {
        let file = tempfile::tempfile_in(folder).map_err(|error| {
            if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
                Self::say_why_not(&error);
            } else {
                tracing::warn!(directory = %folder.display(), %error, "no file for the copy of a NAR can be made, and none is copied for a minute: make the state folder writable, or set limits.nar_copies = \"0 B\"");
            }
            NoFile::Failed
        })?;
        let (bytes, taken) = (room.bytes.unsigned_abs(), room.taken.get().unsigned_abs());
        // Some file systems don't say.
        if let Ok(disk) = rustix::fs::fstatvfs(&file)
            && disk.f_blocks > 0
        {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            if is_too_much(taken, free.saturating_add(taken.saturating_sub(bytes))) {
                tracing::debug!(
                    bytes,
                    free,
                    "a NAR is not copied: copies would take more than a tenth of what the disk has free"
                );
                return Err(NoFile::TooLong);
            }
        }
        // Writing takes a third less where the disk has set all of it aside; not every file system can.
        match rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes) {
            // Most likely a quota, of which was not told above.
            Err(full @ (Errno::NOSPC | Errno::DQUOT)) => {
                Self::say_why_not(&full.into());
                Err(NoFile::Failed)
            }
            _ => Ok(Self { file, _room: room }),
        }
    }

    /// Says why one can't be written.
    pub(super) fn say_why_not(error: &std::io::Error) {
        tracing::info!(%error, "a NAR can't be copied, and none is for a minute: is there room where state.directory lies?");
    }

    pub(super) fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }

    /// How much of the slices was written: what follows each other in them does so in the file.
    pub(super) fn write_at(&self, slices: &[IoSlice<'_>], at: u64) -> std::io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| rustix::io::pwritev(&self.file, slices, at))?)
    }

    pub(super) fn write_all_at(&self, bytes: &[u8], at: u64) -> std::io::Result<()> {
        self.file.write_all_at(bytes, at)
    }
}

/// Whether copies of so many bytes are more than their share of what is free without them.
fn is_too_much(copies: u64, free: u64) -> bool {
    copies > free / SHARE_OF_FREE
}

impl AsFd for CopyFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::super::leases::Generation;
    use super::*;

    /// Of as many as there are of them.
    fn permit() -> OwnedSemaphorePermit {
        Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap()
    }

    impl Leave {
        pub(in super::super) fn of_a_test() -> Self {
            Self::new(permit(), Lease(Arc::new(Generation { id: 1 })))
        }
    }

    impl CopyFile {
        /// One that can't be written.
        pub(in super::super) fn full(room: Room) -> Self {
            Self { file: File::options().write(true).open("/dev/full").unwrap(), _room: room }
        }
    }

    #[test]
    fn room_is_set_aside_before_anything_is_written() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir().unwrap();
        let file = CopyFile::make(folder.path(), Room::of_a_test(3_000_000, &Gauge::default())).unwrap();
        let meta = file.file.metadata().unwrap();
        assert!(meta.len() == 0 && meta.blocks() * 512 >= 3_000_000);
    }

    #[test]
    fn most_of_what_is_free_stays_free_whoever_took_the_rest() {
        assert!(!is_too_much(10, 100) && is_too_much(11, 100) && is_too_much(1, 0));
        let (folder, taken) = (tempfile::tempdir().unwrap(), Gauge::default());
        let disk = rustix::fs::statvfs(folder.path()).unwrap();
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let make = |bytes| CopyFile::make(folder.path(), Room::of_a_test(bytes, &taken));
        assert!(matches!(make(free / 5 + 1), Err(NoFile::TooLong)));
        assert_eq!(taken.get(), 0);
        assert!(make(1000).is_ok());
        // What the other copies take counts.
        let _others = Room::of_a_test(free / 5 + 1, &taken);
        assert!(matches!(make(1000), Err(NoFile::TooLong)));
    }

    impl Room {
        pub(in super::super) fn of_a_test(bytes: u64, taken: &Gauge) -> Self {
            Self::new(bytes, permit(), taken.clone())
        }
    }
}
