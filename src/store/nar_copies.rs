//! Copies of NARs of many small files, so that whoever asks next need not wait for thousands of files to be opened.
//!
//! Each lies in one file without a name in the state folder, and mostly in the kernel's page cache. It is made once, by a task of its
//! own, at the pace of the disk, behind what was read of it while the tree was laid out, and all who ask meanwhile follow it: a slow client
//! holds up nobody. What is in it was read while the path was leased, from files that were what they had been when they were laid out. No
//! copy, or one that fails, is no harm: the tree is read then.
//!
//! The invariant: whatever happens, the files that are there are not longer than `limits.nar_copies` together. A copy holds
//! its room until the last who reads it is through, and one that would need more is not made.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::buffers::BufferPool;
use super::copy_file::{CopyFile, Leave, NoFile, Room};
use super::known::{KnownPath, Stamp};
use super::leases::LeaseMark;
use super::nar_chunks::NarChunks;
use super::nar_copy::{CopyReader, Made, NarCopy, Start};
use super::nar_head::{Head, NarHead, are_small};
use super::nar_reader::NarReader;
use crate::metrics::StoreMetrics;
use crate::nix::StorePathHash;
use crate::nix::layout::NarLayout;

/// A shorter NAR is read in no time from its tree.
const SHORTEST: u64 = 4 * 1024 * 1024;
/// One NAR may take one part in so many of the room.
const LARGEST_SHARE: u64 = 4;
/// And one part in so many of the memory: what the page cache can't take is written at the pace of the disk.
const LARGEST_SHARE_OF_MEMORY: u64 = 16;
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
    /// So many bytes are the most that one NAR may take.
    largest: u64,
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
    /// The copy of what lies at the path now.
    fn of(&mut self, known: &KnownPath) -> Option<&mut Entry> {
        let entry = self.copies.get_mut(&known.info.hash())?;
        (entry.stamp == known.stamp && !entry.copy.has_failed()).then_some(entry)
    }

    /// Takes out the copy that nobody reads and nobody has asked for the longest. `None`: all are being read.
    fn take_oldest(&mut self) -> Option<Entry> {
        let at_rest = self.copies.iter().filter(|(_, entry)| entry.copy.is_at_rest());
        let oldest = *at_rest.min_by_key(|(_, entry)| entry.asked)?.0;
        self.copies.remove(&oldest)
    }

    fn is_paused(&self, now: Instant) -> bool {
        self.failed.is_some_and(|at| now.saturating_duration_since(at) < PAUSE)
    }
}

#[derive(Debug)]
struct Entry {
    stamp: Stamp,
    copy: Arc<NarCopy>,
    asked: Instant,
}

/// Of this host, in bytes.
fn memory() -> u64 {
    let host = rustix::system::sysinfo();
    (host.totalram as u64).saturating_mul(u64::from(host.mem_unit))
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
            let largest = (capacity / LARGEST_SHARE).min(memory() / LARGEST_SHARE_OF_MEMORY);
            Arc::new(Inner { folder, capacity, largest, metrics, room, makers, table: Mutex::default() })
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
        if let Some(entry) = table.of(known) {
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
        let leave = inner.leave(&known.lease)?;
        table.copies.remove(&hash);
        let (room, folder) = (inner.room_for(len, &mut table)?, inner.folder.clone());
        let start = Start::Nothing(Box::new(move || CopyFile::make(&folder, room)), leave);
        let copy = inner.make(known, layout, pool, start, &mut table);
        inner.metrics.nars_from_copies.inc();
        Some(CopyReader::new(&copy))
    }

    /// The head of a copy, for who lays the path out; it keeps a maker's place and its room from its first bytes until that is done.
    /// `None`: there is a copy, or there can't be one.
    pub(super) fn head(&self, known: &KnownPath) -> Option<NarHead> {
        let len = known.info.nar_size;
        let inner = self.0.as_ref().filter(|inner| inner.fits(len))?;
        let mut table = inner.table();
        let is_possible = inner.makers.available_permits() > 0
            && inner.room.available_permits() >= inner.units(len) as usize
            && !table.is_paused(Instant::now());
        if !is_possible || table.of(known).is_some() {
            return None;
        }
        let (of_all, lease) = (Arc::clone(inner), known.lease.clone());
        let make = move || {
            // No copy goes for it: nobody knows yet whether it will be one.
            let (leave, room) = (of_all.leave(&lease)?, of_all.free_room(len)?);
            match CopyFile::make(&of_all.folder, room) {
                Ok(file) => Some((file, leave)),
                Err(NoFile::TooLong) => None,
                Err(NoFile::Failed) => {
                    of_all.table().failed = Some(Instant::now());
                    None
                }
            }
        };
        Some(NarHead::new(len, Box::new(make)))
    }

    /// Makes a copy of a head, now that the path is laid out, if it is worth it and nobody else has begun one.
    pub(super) fn go_on(&self, known: &KnownPath, layout: &Arc<NarLayout>, head: Head, pool: &BufferPool) {
        let Some(inner) = self.0.as_ref().filter(|inner| inner.is_worth_it(layout)) else { return };
        let mut table = inner.table();
        if table.of(known).is_none() {
            inner.make(known, layout, pool, Start::Head(head), &mut table);
        }
    }

    pub(super) fn forget(&self, hash: &StorePathHash) {
        if let Some(inner) = &self.0 {
            let gone = inner.table().copies.remove(hash);
            drop(gone);
        }
    }

    /// Lets go what nobody asks for any more. Ends when dropped.
    pub(super) async fn sweep(self) {
        let Some(inner) = self.0 else { return };
        let mut ticks = tokio::time::interval(SWEEP_PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let going = inner.idle(Instant::now());
            let _ = spawn_blocking(move || drop(going)).await;
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
        (SHORTEST..=self.largest).contains(&len)
    }

    /// `None`: enough are being made, or the path is not leased.
    fn leave(&self, lease: &LeaseMark) -> Option<Leave> {
        Some(Leave::new(Arc::clone(&self.makers).try_acquire_owned().ok()?, lease.lease()?))
    }

    /// Puts a copy in the table, and makes what is not there of it.
    fn make(
        self: &Arc<Self>,
        known: &KnownPath,
        layout: &Arc<NarLayout>,
        pool: &BufferPool,
        start: Start,
        table: &mut Table,
    ) -> Arc<NarCopy> {
        let (hash, len) = (known.info.hash(), layout.len());
        let reader = NarReader::new(known.real.clone(), Arc::clone(layout), start.len()..len);
        let (copy, maker) = NarCopy::new(len, start);
        let making = maker.run(NarChunks::new(reader, pool.clone()));
        let (of_all, made) = (Arc::clone(self), Arc::clone(&copy));
        tokio::spawn(async move {
            let end = making.await;
            let going = of_all.ended(&hash, made, end);
            let _ = spawn_blocking(move || drop(going)).await;
        });
        let entry = Entry { stamp: known.stamp, copy: Arc::clone(&copy), asked: Instant::now() };
        table.copies.insert(hash, entry);
        copy
    }

    /// In what room is counted. A short copy takes its share of the number, too.
    fn units(&self, len: u64) -> u32 {
        u32::try_from(len.max(self.capacity / MOST).div_ceil(UNIT)).unwrap_or(u32::MAX)
    }

    /// Room for a copy. `None`: there is none free.
    fn free_room(&self, len: u64) -> Option<Room> {
        let permit = Arc::clone(&self.room).try_acquire_many_owned(self.units(len)).ok()?;
        Some(Room::new(len, permit, self.metrics.nar_copies_bytes.clone()))
    }

    /// Room for a copy, for which those go that nobody has asked for the longest. `None`: what is there is being read.
    fn room_for(&self, len: u64, table: &mut Table) -> Option<Room> {
        loop {
            if let Some(room) = self.free_room(len) {
                return Some(room);
            }
            // Here and now: its room is needed.
            drop(table.take_oldest()?);
        }
    }

    /// As much room is kept free as the largest copy takes: a head has to have it before it is known what it will come to. Takes out what
    /// has to go for that, besides what goes already.
    fn keep_free(&self, table: &mut Table, going: &mut Vec<Entry>) {
        let largest = self.units(self.largest) as usize;
        let units = |entry: &Entry| self.units(entry.copy.len()) as usize;
        let mut free = self.room.available_permits() + going.iter().map(units).sum::<usize>();
        while free < largest
            && let Some(entry) = table.take_oldest()
        {
            free += units(&entry);
            going.push(entry);
        }
    }

    /// What has to go now. To close it takes a while, and nobody may have to wait for that.
    #[must_use]
    fn ended(&self, hash: &StorePathHash, copy: Arc<NarCopy>, end: Made) -> Vec<Entry> {
        let mut table = self.table();
        if end == Made::Failed {
            table.failed = Some(Instant::now());
        }
        // Another may be in its place by now.
        let is_it = table.copies.get(hash).is_some_and(|entry| Arc::ptr_eq(&entry.copy, &copy));
        if end != Made::Whole && is_it {
            table.copies.remove(hash);
        }
        // It may be the oldest, and has to give its room back when it goes.
        drop(copy);
        let mut going = Vec::new();
        self.keep_free(&mut table, &mut going);
        going
    }

    /// What has to go now, as above.
    #[must_use]
    fn idle(&self, now: Instant) -> Vec<Entry> {
        let is_idle = |entry: &Entry| now.saturating_duration_since(entry.asked) > IDLE;
        let mut table = self.table();
        let idle = table.copies.extract_if(|_, entry| entry.copy.is_at_rest() && is_idle(entry));
        let mut going = idle.map(|(_, entry)| entry).collect();
        // Those that were being read may be at rest by now.
        self.keep_free(&mut table, &mut going);
        going
    }
}

#[cfg(test)]
mod tests {
    use super::super::leases::Generation;
    use super::super::tree::lay_out;
    use super::*;
    use crate::nix::narinfo::PathInfo;
    use crate::nix::{NarHash, StoreDir};

    /// A store of trees, the process that leases them, and the copies of their NARs.
    struct Bench {
        folder: tempfile::TempDir,
        generation: Arc<Generation>,
        copies: NarCopies,
        metrics: StoreMetrics,
        pool: BufferPool,
    }

    impl Bench {
        fn new() -> Self {
            let (folder, metrics) = (tempfile::tempdir().unwrap(), StoreMetrics::default());
            let copies = NarCopies::new(Some(folder.path().to_owned()), 40 * 1024 * 1024, &metrics);
            let generation = Arc::new(Generation { id: 1 });
            Self { folder, generation, copies, metrics, pool: BufferPool::default() }
        }

        /// So many files of 8,000 bytes, and one of so many behind them.
        fn path(&self, number: u32, files: usize, last: usize) -> KnownPath {
            let real = self.folder.path().join(number.to_string());
            std::fs::create_dir_all(&real).unwrap();
            for file in 0..files {
                std::fs::write(real.join(format!("f{file}")), vec![b'x'; 8000]).unwrap();
            }
            std::fs::write(real.join("last"), vec![b'x'; last]).unwrap();
            let path = format!("/nix/store/{}-tree", number.to_string().repeat(32));
            let info = PathInfo {
                store_path: StoreDir::default().parse_path(path.as_bytes()).unwrap(),
                nar_hash: NarHash::from_digest([0; 32]),
                nar_size: lay_out(&real, None, || true).unwrap().len(),
                references: Default::default(),
                deriver: None,
                signatures: Vec::new(),
                ca: None,
            };
            let stamp = Stamp::of(&real).unwrap();
            KnownPath::new(info, real, stamp, LeaseMark::of(&self.generation))
        }

        /// Lays the path out, with a head if it may have one; says whether it may.
        fn laid_out(&self, known: &KnownPath) -> (Arc<NarLayout>, Option<NarHead>) {
            let mut head = self.copies.head(known).map(NarHead::patient);
            let layout = Arc::new(lay_out(&known.real, head.as_mut(), || true).unwrap());
            (layout, head)
        }

        /// Where copies lie, by path: in how many there is something, and their bytes.
        fn copied(&self) -> (usize, i64) {
            let copies = &self.copies.0.as_ref().unwrap().table().copies;
            (copies.len(), self.metrics.nar_copies_bytes.get())
        }

        async fn until_made(&self) {
            let makers = &self.copies.0.as_ref().unwrap().makers;
            drop(makers.acquire_many(MAKERS as u32).await.unwrap());
        }
    }

    #[tokio::test]
    async fn a_copy_goes_on_behind_its_head_and_no_second_head_takes_its_place() {
        let bench = Bench::new();
        let known = bench.path(1, 900, 0);
        let (layout, head) = bench.laid_out(&known);
        let (_, other) = bench.laid_out(&known);
        let end = |head: Option<NarHead>| head.and_then(NarHead::end).unwrap();
        assert_eq!(bench.copied(), (0, 2 * layout.len() as i64));
        bench.copies.go_on(&known, &layout, end(head), &bench.pool);
        let copy = |table: &mut Table| Arc::clone(&table.of(&known).unwrap().copy);
        let first = copy(&mut bench.copies.0.as_ref().unwrap().table());
        assert!(first.reaches(1));
        bench.copies.go_on(&known, &layout, end(other), &bench.pool);
        assert!(Arc::ptr_eq(&first, &copy(&mut bench.copies.0.as_ref().unwrap().table())));
        let reader = bench.copies.of(&known, &layout, &(0..layout.len()), &bench.pool);
        assert!(reader.is_some() && bench.copies.head(&known).is_none());
        bench.until_made().await;
        assert!(first.reaches(layout.len()));
        assert_eq!(bench.copied(), (1, layout.len() as i64));
    }

    #[tokio::test]
    async fn a_tree_that_turns_out_large_has_no_copy_and_nothing_goes_for_it() {
        let bench = Bench::new();
        for number in 1..=5 {
            let known = bench.path(number, 900, 0);
            let layout = bench.laid_out(&known).0;
            assert!(bench.copies.of(&known, &layout, &(0..layout.len()), &bench.pool).is_some());
            bench.until_made().await;
        }
        // So much is kept free that a head always has room. What goes for that is closed a little later.
        let each = bench.path(1, 900, 0).info.nar_size as i64;
        let closed = async {
            while bench.copied() != (4, 4 * each) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), closed).await.unwrap();
        let (there, bytes) = (4, 4 * each);
        let large = bench.path(6, 100, 9_000_000);
        let (layout, head) = bench.laid_out(&large);
        let head = head.and_then(NarHead::end).unwrap();
        assert_eq!(bench.metrics.nar_copies_bytes.get(), bytes + large.info.nar_size as i64);
        bench.copies.go_on(&large, &layout, head, &bench.pool);
        assert_eq!(bench.copied(), (there, bytes));
        // It gave its place back.
        assert_eq!(bench.copies.0.as_ref().unwrap().makers.available_permits(), MAKERS);
    }

    #[tokio::test]
    async fn a_copy_that_is_the_oldest_when_it_is_made_goes_alone() {
        let bench = Bench::new();
        let paths: Vec<KnownPath> = (1..=3).map(|number| bench.path(number, 900, 0)).collect();
        let last = bench.path(5, 1150, 0);
        let of = |known: &KnownPath| {
            let layout = Arc::new(lay_out(&known.real, None, || true).unwrap());
            assert!(bench.copies.of(known, &layout, &(0..layout.len()), &bench.pool).is_some());
        };
        for known in &paths {
            of(known);
            bench.until_made().await;
        }
        // Begun, left, and asked for before all others when it is whole.
        of(&last);
        paths.iter().for_each(of);
        bench.until_made().await;
        let mut table = bench.copies.0.as_ref().unwrap().table();
        let there: Vec<bool> = paths.iter().chain([&last]).map(|known| table.of(known).is_some()).collect();
        assert_eq!(there, [true, true, true, false]);
    }

    #[tokio::test]
    async fn a_head_without_leave_or_room_is_none() {
        let bench = Bench::new();
        let known = bench.path(1, 900, 0);
        let inner = bench.copies.0.as_ref().unwrap();
        let begins = || bench.laid_out(&known).1.and_then(NarHead::end).is_some();
        let places = inner.makers.try_acquire_many(MAKERS as u32).unwrap();
        assert!(!begins());
        drop(places);
        let room =
            Arc::clone(&inner.room).try_acquire_many_owned(inner.units(inner.capacity * 7 / 8)).unwrap();
        assert!(!begins());
        drop(room);
        assert!(begins());
        // The process that leased the path died.
        let mut bench = bench;
        bench.generation = Arc::new(Generation { id: 2 });
        assert!(bench.laid_out(&known).1.is_some_and(|head| head.end().is_none()));
    }
}
