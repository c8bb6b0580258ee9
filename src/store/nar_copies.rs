//! Copies of NARs of many small files, so that whoever asks next need not wait for thousands of files to be opened.
//!
//! Each lies in one file without a name in the state folder, and mostly in the kernel's page cache. It is made once, by a task of its
//! own, at the pace of the disk, and all who ask meanwhile follow it: a slow client holds up nobody. What is in it was read while the path was leased, from
//! files that were what they had been when they were laid out. No copy, or one that fails, is no harm: the tree is read then.
//!
//! The invariant: whatever happens, the files that are there are not longer than `limits.nar_copies` together. A copy holds
//! its room until the last who reads it is through, and one that would need more is not made.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::buffers::BufferPool;
use super::copy_file::{CopyFile, Room};
use super::known::{KnownPath, Stamp};
use super::leases::Lease;
use super::nar_chunks::NarChunks;
use super::nar_copy::{CopyReader, Made, NarCopy};
use super::nar_head::{Head, NarHead, are_small};
use super::nar_reader::NarReader;
use crate::metrics::StoreMetrics;
use crate::nix::StorePathHash;
use crate::nix::layout::NarLayout;

/// A shorter NAR is read in no time from its tree.
const SHORTEST: u64 = 4 * 1024 * 1024;
/// One NAR may take so much of the room.
const LARGEST_SHARE: u64 = 4;
/// How many there are at most: each is an open file.
const MOST: u64 = 64;
/// In what room is counted, in bytes.
const UNIT: u64 = 1024;
/// Copies that are made at the same time.
const MAKERS: usize = 2;
/// How long nothing is copied after a copy failed: a full disk stays full for a while.
const PAUSE: Duration = Duration::from_secs(60);
/// A copy that nobody asks for is let go.
const IDLE: Duration = Duration::from_secs(3600);
/// How often it is looked for those.
const SWEEP_PERIOD: Duration = Duration::from_secs(60);

/// The copies. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct NarCopies(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    capacity: u64,
    metrics: StoreMetrics,
    /// What no copy takes.
    room: Arc<Semaphore>,
    makers: Arc<Semaphore>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    copies: HashMap<StorePathHash, Entry>,
    /// When a copy failed last.
    failed: Option<Instant>,
}

impl Table {
    fn is_paused(&self, now: Instant) -> bool {
        self.failed.is_some_and(|at| now.saturating_duration_since(at) < PAUSE)
    }
}

/// What it takes to make a copy: one of the makers' places, and the lease that keeps its path.
struct Leave {
    _place: OwnedSemaphorePermit,
    _lease: Lease,
}

/// A copy that is begun while its path is laid out.
pub(super) struct CopyAhead {
    head: NarHead,
    leave: Leave,
}

impl CopyAhead {
    /// Where the NAR goes as far as it is read.
    pub(super) fn head(&mut self) -> &mut NarHead {
        &mut self.head
    }
}

#[derive(Debug)]
struct Entry {
    stamp: Stamp,
    copy: Arc<NarCopy>,
    asked: Instant,
}

impl NarCopies {
    /// Copies of `capacity` bytes in all, in a folder that may come to be later. 0, or no folder: none at all.
    #[must_use]
    pub fn new(folder: Option<PathBuf>, capacity: u64, metrics: &StoreMetrics) -> Self {
        let folder = folder.filter(|_| capacity > 0);
        Self(folder.map(|folder| {
            let units = usize::try_from(capacity / UNIT).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
            let (room, makers) = (Arc::new(Semaphore::new(units)), Arc::new(Semaphore::new(MAKERS)));
            let metrics = metrics.clone();
            Arc::new(Inner { folder, capacity, metrics, room, makers, table: Mutex::default() })
        }))
    }

    /// The copy that has the beginning of this range already; one is begun where it is worth it. `None`: read the tree.
    pub(super) fn of(
        &self,
        known: &KnownPath,
        layout: &Arc<NarLayout>,
        range: &Range<u64>,
        pool: &BufferPool,
    ) -> Option<CopyReader> {
        let inner = self.0.as_ref().filter(|inner| inner.is_worth_it(layout))?;
        let (hash, len, now) = (known.info.hash(), layout.len(), Instant::now());
        let mut table = inner.table();
        let there = table.copies.get_mut(&hash);
        if let Some(entry) = there.filter(|entry| entry.stamp == known.stamp && !entry.copy.has_failed()) {
            if !entry.copy.reaches(range.start) {
                return None;
            }
            entry.asked = now;
            inner.metrics.nars_from_copies.inc();
            return Some(CopyReader::new(&entry.copy));
        }
        // Who wants a part need not wait for what is before it, and does not want what comes after.
        if *range != (0..len) || table.is_paused(now) {
            return None;
        }
        let leave = inner.leave(known)?;
        table.copies.remove(&hash);
        let room = inner.room_for(len, &mut table)?;
        let folder = inner.folder.clone();
        let make_file = move || CopyFile::make(&folder, room);
        let copy = inner.make(known, layout, pool, (leave, None), make_file, &mut table);
        inner.metrics.nars_from_copies.inc();
        Some(CopyReader::new(&copy))
    }

    /// A copy that is begun while the path is laid out. `None`: there is one, or there can't be.
    pub(super) fn ahead(&self, known: &KnownPath) -> Option<CopyAhead> {
        let (hash, len) = (known.info.hash(), known.info.nar_size);
        let inner = self.0.as_ref().filter(|inner| inner.fits(len))?;
        let table = inner.table();
        let is_there = |entry: &Entry| entry.stamp == known.stamp && !entry.copy.has_failed();
        if table.is_paused(Instant::now()) || table.copies.get(&hash).is_some_and(is_there) {
            return None;
        }
        let (leave, of_all) = (inner.leave(known)?, Arc::clone(inner));
        let make_file = move || {
            let room = of_all.room_for(len, &mut of_all.table())?;
            let file = CopyFile::make(&of_all.folder, room);
            if file.is_none() {
                of_all.table().failed = Some(Instant::now());
            }
            file
        };
        Some(CopyAhead { head: NarHead::new(Box::new(make_file)), leave })
    }

    /// Makes the rest of a copy that was begun, now that its path is laid out.
    pub(super) fn go_on(
        &self,
        known: &KnownPath,
        layout: &Arc<NarLayout>,
        CopyAhead { head, leave }: CopyAhead,
        pool: &BufferPool,
    ) {
        let inner = self.0.as_ref().filter(|inner| inner.is_worth_it(layout));
        if let (Some(inner), Some(head)) = (inner, head.end()) {
            inner.make(known, layout, pool, (leave, Some(head)), || None, &mut inner.table());
        }
    }

    pub(super) fn forget(&self, hash: &StorePathHash) {
        if let Some(inner) = &self.0 {
            inner.table().copies.remove(hash);
        }
    }

    /// Lets go what nobody asks for any more. Ends when dropped.
    pub(super) async fn sweep(self) {
        let Some(inner) = self.0 else { return };
        let mut ticks = tokio::time::interval(SWEEP_PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            inner.let_go(Instant::now());
        }
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_worth_it(&self, layout: &NarLayout) -> bool {
        self.fits(layout.len()) && are_small(layout.len(), layout.entries())
    }

    fn fits(&self, len: u64) -> bool {
        (SHORTEST..=self.capacity / LARGEST_SHARE).contains(&len)
    }

    /// `None`: enough are being made, or the path is not leased.
    fn leave(&self, known: &KnownPath) -> Option<Leave> {
        let (place, lease) = (Arc::clone(&self.makers).try_acquire_owned().ok()?, known.lease()?);
        Some(Leave { _place: place, _lease: lease })
    }

    /// Puts a copy in the table, and makes what is not there of it.
    fn make(
        self: &Arc<Self>,
        known: &KnownPath,
        layout: &Arc<NarLayout>,
        pool: &BufferPool,
        (leave, head): (Leave, Option<Head>),
        make_file: impl FnOnce() -> Option<CopyFile> + Send + 'static,
        table: &mut Table,
    ) -> Arc<NarCopy> {
        let (hash, len) = (known.info.hash(), layout.len());
        let from = head.as_ref().map_or(0, |(_, len)| *len);
        let reader = NarReader::new(known.real.clone(), Arc::clone(layout), from..len);
        let (copy, maker) = NarCopy::new(len, head);
        let making = maker.run(NarChunks::new(reader, pool.clone()), make_file);
        let (of_all, made) = (Arc::clone(self), Arc::clone(&copy));
        tokio::spawn(async move {
            let end = making.await;
            drop(leave);
            of_all.ended(&hash, &made, end);
        });
        let entry = Entry { stamp: known.stamp, copy: Arc::clone(&copy), asked: Instant::now() };
        table.copies.insert(hash, entry);
        copy
    }

    /// Room for a copy, for which those go that nobody has asked for the longest. `None`: what is there is being read.
    fn room_for(&self, len: u64, table: &mut Table) -> Option<Room> {
        // A short one takes its share of the number, too.
        let units = u32::try_from(len.max(self.capacity / MOST).div_ceil(UNIT)).ok()?;
        loop {
            if let Ok(permit) = Arc::clone(&self.room).try_acquire_many_owned(units) {
                return Some(Room::new(len, permit, self.metrics.nar_copies_bytes.clone()));
            }
            let at_rest = table.copies.iter().filter(|(_, entry)| entry.copy.is_at_rest());
            let oldest = *at_rest.min_by_key(|(_, entry)| entry.asked)?.0;
            table.copies.remove(&oldest);
        }
    }

    fn ended(&self, hash: &StorePathHash, copy: &Arc<NarCopy>, end: Made) {
        let mut table = self.table();
        if end == Made::Failed {
            table.failed = Some(Instant::now());
        }
        // Another may be in its place by now.
        let is_it = table.copies.get(hash).is_some_and(|entry| Arc::ptr_eq(&entry.copy, copy));
        if end != Made::Whole && is_it {
            table.copies.remove(hash);
        }
    }

    fn let_go(&self, now: Instant) {
        let is_idle = |entry: &Entry| now.saturating_duration_since(entry.asked) > IDLE;
        self.table().copies.retain(|_, entry| !(entry.copy.is_at_rest() && is_idle(entry)));
    }
}
