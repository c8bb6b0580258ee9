//! All spools: which NAR is in which, and how much memory and disk they take together.
//!
//! A NAR that is on its way is downloaded once, however many ask for it. One reader alone needs no file: what it has read is let
//! go. A second one gives the download a file, or, too late for its beginning, begins another that has one. What is complete
//! stays for whoever asks next, until it is not asked for any more or its place is needed: the least recently used goes first.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::budget::{Budget, Reserved};
use super::spool::{Spool, SpoolReader, SpoolWriter, StillRead};
use super::spool_state::{Keep, WINDOW};
use crate::nix::NarHash;

/// After how long what nobody asked for goes.
const IDLE: Duration = Duration::from_secs(60);
/// Spools that are kept at once, whatever their sizes.
const MAX_SPOOLS: usize = 4096;
/// A window takes this part of the memory that is left, 1 / `WINDOWS`.
const WINDOWS: u64 = 16;
/// No window is smaller, in bytes.
const LEAST_WINDOW: u64 = 256 * 1024;

/// All spools. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct Spools(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Where files are made; without it there are none.
    directory: Option<PathBuf>,
    memory: Arc<Budget>,
    disk: Arc<Budget>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    spools: HashMap<NarHash, Entry>,
    /// Those that may still be read, though nobody finds them any more.
    left: Vec<Weak<Spool>>,
    is_closed: bool,
}

#[derive(Debug)]
struct Entry {
    spool: Arc<Spool>,
    used: Instant,
}

/// How somebody who wants a NAR gets it.
#[derive(Debug)]
pub enum Begin {
    /// It is there, or on its way.
    Read(SpoolReader),
    /// It is not there, or too far ahead to be joined: whoever gets this downloads it.
    Write(SpoolWriter, SpoolReader),
    /// The spools are closed: nobody is let in any more.
    Closed,
}

/// How a NAR that nobody waits for yet comes before it is asked for.
#[derive(Debug)]
pub enum Prepare {
    /// It is there, or on its way.
    IsThere,
    /// Whoever gets this downloads it.
    Write(SpoolWriter),
    /// It does not, for now.
    NoRoom,
}

/// Memory that a download takes beside its spool; dropping it gives it back.
#[derive(Debug)]
pub struct Memory(Reserved);

impl Memory {
    /// How much, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.amount()
    }
}

impl Spools {
    /// None yet. Files are made in `directory` (they have no names, so that a crash leaves none) and take `disk` bytes at most;
    /// what is kept in memory takes `memory` bytes at most, windows and all, but less of it never keeps a download out.
    #[must_use]
    pub fn new(directory: Option<PathBuf>, memory: u64, disk: u64) -> Self {
        let freed = Arc::new(Notify::new());
        let (memory, disk) = (Budget::new(memory, Arc::clone(&freed)), Budget::new(disk, freed));
        Self(Arc::new(Inner { directory, memory, disk, table: Mutex::default() }))
    }

    /// The length in bytes of a NAR that is there or on its way.
    #[must_use]
    pub fn len_of(&self, nar: &NarHash) -> Option<u64> {
        self.lock().spools.get(nar)?.spool.joinable_len()
    }

    /// Joins the download of a NAR, or begins it, kept `whole` in memory or not. May be dropped midway. It waits while there is
    /// no memory to be had, and the caller says for how long.
    pub async fn begin(&self, nar: &NarHash, size: u64, whole: bool) -> Begin {
        loop {
            let freed = self.0.memory.freed().notified();
            if let Some(begin) = self.try_begin(nar, size, whole) {
                return begin;
            }
            freed.await;
        }
    }

    /// Begins the download of a NAR that nobody waits for yet, kept whole in memory.
    #[must_use]
    pub fn prepare(&self, nar: &NarHash, size: u64) -> Prepare {
        let mut table = self.lock();
        if table.spools.contains_key(nar) {
            return Prepare::IsThere;
        }
        // Half stays for what is asked for: a guess that is on its way can't be taken back.
        let memory = &self.0.memory;
        let fits = table.available(memory, Spool::was_read) >= size.saturating_add(memory.limit() / 2);
        if table.is_closed || !fits {
            return Prepare::NoRoom;
        }
        // For what may never be asked for only what was read already is given up.
        let Some(reserved) = table.make_room(memory, size, Spool::was_read) else { return Prepare::NoRoom };
        let writer = Spool::begin(size, Keep::All, None, vec![reserved]);
        table.insert(nar, &writer);
        Prepare::Write(writer)
    }

    /// Memory for what of a download comes before its turn: at most so many bytes, and no more than leaves half of all memory,
    /// and then some, to downloads that begin.
    #[must_use]
    pub fn memory_ahead(&self, least: u64, most: u64) -> Option<Memory> {
        let mut table = self.lock();
        let memory = &self.0.memory;
        let available = table.available(memory, Spool::was_read);
        let amount = (available.saturating_sub(memory.limit() / 2) / 2).min(most);
        let reserved = (amount >= least).then(|| table.make_room(memory, amount, Spool::was_read));
        reserved.flatten().map(Memory)
    }

    fn try_begin(&self, nar: &NarHash, size: u64, whole: bool) -> Option<Begin> {
        let mut table = self.lock();
        if table.is_closed {
            return Some(Begin::Closed);
        }
        let there = table.spools.get(nar).map(|entry| Arc::clone(&entry.spool));
        // One of another length has a wrong claim for NarSize, or this caller has: they share nothing.
        let same = there.as_ref().filter(|spool| spool.joinable_len() == Some(size));
        if let Some(reader) = same.and_then(|spool| self.join(&mut table, nar, spool)) {
            return Some(Begin::Read(reader));
        }
        let is_shared = there.is_some_and(|spool| !spool.is_idle());
        let memory = &self.0.memory;
        let in_memory = if whole {
            size
        } else {
            // The more there are, the less the next one takes: dozens fit, and none waits for another's end.
            let share = table.available(memory, |_| true) / WINDOWS;
            share.clamp(LEAST_WINDOW, WINDOW).min(size).min(memory.limit())
        };
        let in_memory = table.make_room(memory, in_memory, |_| true)?;
        // Somebody is too far ahead to be joined: so others may come after this one too.
        let file = if is_shared && !whole { self.file(&mut table, size) } else { None };
        let keep = match (&file, whole) {
            (_, true) => Keep::All,
            (Some(_), false) => Keep::File,
            (None, false) => Keep::Window,
        };
        let (file, on_disk) = file.unzip();
        let mut reserved = Vec::from_iter(on_disk);
        let in_window = if whole {
            reserved.push(in_memory);
            None
        } else {
            Some(in_memory)
        };
        let writer = Spool::begin(size, keep, file, reserved);
        if let Some(in_window) = in_window {
            writer.spool().give_window(in_window);
        }
        let reader = writer.spool().read()?;
        table.insert(nar, &writer);
        Some(Begin::Write(writer, reader))
    }

    /// A second reader needs the file that the first did without.
    fn join(&self, table: &mut Table, nar: &NarHash, spool: &Arc<Spool>) -> Option<SpoolReader> {
        let reader = spool.read()?;
        if let Some(entry) = table.spools.get_mut(nar) {
            entry.used = Instant::now();
        }
        if spool.wants_file()
            && let Some((file, reserved)) = self.file(table, reader.total())
        {
            spool.give_file(file, reserved);
        }
        Some(reader)
    }

    fn file(&self, table: &mut Table, size: u64) -> Option<(File, Reserved)> {
        let directory = self.0.directory.as_ref()?;
        let reserved = table.make_room(&self.0.disk, size, |_| true)?;
        match tempfile::tempfile_in(directory) {
            Ok(file) => Some((file, reserved)),
            Err(error) => {
                let directory = directory.display();
                tracing::warn!(%directory, %error, "no file for a spool can be made; downloads are shared in memory alone");
                None
            }
        }
    }

    /// Lets go what nobody has asked for in a while, and what nobody can join any more.
    pub fn sweep(&self, now: Instant) {
        self.lock().spools.retain(|_, entry| {
            let is_old = now.saturating_duration_since(entry.used) >= IDLE;
            let goes = entry.spool.is_idle() && (is_old || entry.spool.joinable_len().is_none());
            if goes {
                entry.spool.begin_to_close();
            }
            !goes
        });
    }

    /// Closes all: lets nobody in any more, and waits until all readers have left.
    pub async fn close(&self, within: Duration) -> Result<(), StillRead> {
        let all = self.lock().close();
        // Who waits for memory waits in vain.
        self.0.memory.freed().notify_waiters();
        let closed = futures_util::future::join_all(all.iter().map(|spool| spool.close(within))).await;
        let late: usize = closed.iter().filter_map(|closed| closed.as_ref().err()).map(|e| e.readers).sum();
        if late == 0 { Ok(()) } else { Err(StillRead { readers: late, waited: within }) }
    }

    /// Bytes of memory and of disk that are taken now.
    #[must_use]
    pub fn taken(&self) -> (u64, u64) {
        (self.0.memory.taken(), self.0.disk.taken())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, nar: &NarHash, writer: &SpoolWriter) {
        if self.spools.len() >= MAX_SPOOLS {
            self.evict(|_| true);
        }
        let entry = Entry { spool: Arc::clone(writer.spool()), used: Instant::now() };
        // What was there before has failed, or is read on by those who have it.
        if let Some(before) = self.spools.insert(*nar, entry) {
            before.spool.begin_to_close();
            self.left.retain(|spool| spool.strong_count() > 0);
            self.left.push(Arc::downgrade(&before.spool));
        }
    }

    /// Reserves, and gives up what was least recently used for it, of what takes some of this budget and may go.
    fn make_room(
        &mut self,
        budget: &Arc<Budget>,
        size: u64,
        may_go: impl Fn(&Spool) -> bool,
    ) -> Option<Reserved> {
        let goes_for = |spool: &Spool| spool.takes_of(budget) > 0 && may_go(spool);
        // Nothing is given up in vain.
        if budget.free() < size && self.available(budget, &may_go) < size {
            return None;
        }
        loop {
            if let Some(reserved) = budget.reserve(size) {
                return Some(reserved);
            }
            if !self.evict(goes_for) {
                return None;
            }
        }
    }

    /// How much of this budget is free, or would be if all that nobody reads or writes and that may go went.
    fn available(&self, budget: &Arc<Budget>, may_go: impl Fn(&Spool) -> bool) -> u64 {
        let idle = self.spools.values().filter(|entry| entry.spool.is_idle() && may_go(&entry.spool));
        idle.map(|entry| entry.spool.takes_of(budget)).fold(budget.free(), u64::saturating_add)
    }

    /// Gives up the least recently used spool that nobody reads or writes. False: there is none.
    fn evict(&mut self, may_go: impl Fn(&Spool) -> bool) -> bool {
        let idle = self.spools.iter().filter(|(_, entry)| entry.spool.is_idle() && may_go(&entry.spool));
        let Some(oldest) = idle.min_by_key(|(_, entry)| entry.used).map(|(nar, _)| *nar) else {
            return false;
        };
        if let Some(entry) = self.spools.remove(&oldest) {
            entry.spool.begin_to_close();
        }
        true
    }

    /// Gives all that may still be read, for now and for whoever closes once more.
    fn close(&mut self) -> Vec<Arc<Spool>> {
        self.is_closed = true;
        let found = self.spools.drain().map(|(_, entry)| entry.spool);
        let left = self.left.drain(..).filter_map(|spool| spool.upgrade());
        let all: Vec<_> = found.chain(left).collect();
        self.left = all.iter().map(Arc::downgrade).collect();
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::FutureExt as _;
    use futures_util::stream::{FuturesUnordered, StreamExt as _};

    use super::*;

    fn nar(number: u8) -> NarHash {
        NarHash::from_digest([number; 32])
    }

    fn prepared(spools: &Spools, number: u8, size: u64) -> SpoolWriter {
        let Prepare::Write(writer) = spools.prepare(&nar(number), size) else { panic!("no room") };
        writer
    }

    /// All bytes come, and are good.
    fn fill(writer: SpoolWriter, size: u64) {
        writer.appender().append(vec![0; usize::try_from(size).unwrap()].into());
        writer.finish();
    }

    #[test]
    fn nothing_is_given_up_in_vain_or_for_another_budget() {
        let test = || {
            let spools = Spools::new(None, 100, 100);
            fill(prepared(&spools, 1, 40), 40);
            let (memory, disk) = (&spools.0.memory, &spools.0.disk);
            let _disk = disk.reserve(95).unwrap();
            assert!(spools.lock().make_room(disk, 10, |_| true).is_none());
            let _memory = memory.reserve(55).unwrap();
            assert!(spools.lock().make_room(memory, 50, |_| true).is_none());
            assert_eq!(spools.len_of(&nar(1)), Some(40));
            assert!(spools.lock().make_room(memory, 45, |_| true).is_some());
            assert_eq!(spools.len_of(&nar(1)), None);
        };
        shuttle::check_random(test, 1);
    }

    #[test]
    fn what_comes_before_its_turn_leaves_half_of_the_memory_to_what_begins() {
        let test = || {
            let spools = Spools::new(None, 100, 0);
            fill(prepared(&spools, 1, 20), 20);
            let first = spools.memory_ahead(10, 50).unwrap();
            assert_eq!(first.bytes(), 15, "what was prepared and not read yet stays");
            assert_eq!(spools.memory_ahead(1, 3).unwrap().bytes(), 3);
            assert!(spools.memory_ahead(10, 50).is_none(), "less is of no use");
            drop(first);
            assert_eq!(spools.taken().0, 20);
            assert!(Spools::new(None, 0, 0).memory_ahead(1, 50).is_none());
        };
        shuttle::check_random(test, 1);
    }

    #[test]
    fn many_slow_readers_stay_within_memory_and_each_has_its_turn() {
        let test = || {
            let spools = Spools::new(None, 4 * WINDOW, 0);
            let taken = || spools.taken().0;
            // What was downloaded ahead, and is idle, keeps nobody out.
            fill(prepared(&spools, 255, 2 * WINDOW), 2 * WINDOW);
            let (names, mut inside, mut had_a_turn) =
                ((0..40).map(nar).collect::<Vec<_>>(), VecDeque::new(), 0);
            let mut waiting: FuturesUnordered<_> =
                names.iter().map(|nar| spools.begin(nar, 5 * WINDOW, false)).collect();
            while had_a_turn < 40 {
                while let Some(begin) = waiting.next().now_or_never().flatten() {
                    assert!(matches!(begin, Begin::Write(..)));
                    had_a_turn += 1;
                    inside.push_back(begin);
                }
                assert!(inside.len() > 16 && taken() <= 4 * WINDOW, "{} take {}", inside.len(), taken());
                // One leaves, without having read anything.
                inside.pop_front();
            }
            drop((waiting, inside));
            spools.sweep(Instant::now());
            assert_eq!(taken(), 0);
        };
        shuttle::check_random(test, 1);
    }

    #[test]
    fn a_window_takes_memory_until_it_is_empty_for_good_and_too_little_keeps_nobody_out() {
        let test = || {
            let spools = Spools::new(None, 10, 0);
            let begun = |number| spools.begin(&nar(number), 20, false).now_or_never();
            let Some(Begin::Write(writer, mut reader)) = begun(1) else { panic!("it waits") };
            assert!(begun(2).is_none());
            fill(writer, 20);
            assert!(begun(2).is_none(), "it is still to be read");
            assert!(reader.piece().now_or_never().unwrap().unwrap().is_some());
            assert_eq!(spools.taken().0, 0);
            assert!(begun(2).is_some());
            assert!(Spools::new(None, 0, 0).begin(&nar(1), 20, false).now_or_never().is_some());
        };
        shuttle::check_random(test, 1);
    }
}
