//! The names in the store directory, by hash part.
//!
//! A name is no proof that a path is valid, but a path that has no name is not there. The directory is watched, and
//! before any answer the events that wait are taken in: a path is found from the moment in which it appears. Lost
//! events, or no watch at all, lead to a scan of the directory; a name that is known while that runs is a hint.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime};

use tokio::io::unix::AsyncFd;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};

use super::gains::Gains;
use super::name::is_lock;
use super::name_events::{Change, waiting_events, wakes, watch_directory};
use super::name_list::{NameList, read_names};
use super::name_map::NameMap;
use super::remembered_names::RememberedNames;
use crate::metrics::StoreMetrics;
use crate::nix::{StorePath, StorePathHash};

/// Without a watch, a scan is not older than this before it is made again.
const SCAN_PAUSE: Duration = Duration::from_secs(1);
/// The first event after a while is taken in at once; after it they are gathered for so long.
const GATHER: Duration = Duration::from_millis(10);
/// How many look through a list of names while it grows. To look a name up in a map costs less, and to wait for one nothing.
const LOOKERS: usize = 16;
/// How often it is looked for events without a watch.
const FOLLOW_PERIOD: Duration = Duration::from_millis(250);
/// How often the directory's own time is looked at: some file systems change without events.
const LOOK_PERIOD: Duration = Duration::from_secs(60);

/// The names in the store directory.
#[derive(Debug)]
pub(super) struct Names {
    directory: PathBuf,
    metrics: StoreMetrics,
    names: RwLock<NameMap>,
    /// What a scan has read so far, while it runs.
    read: RwLock<NameList>,
    watch: Mutex<Watch>,
    /// Told of paths that have come; a queue that is full loses some, and nobody waits.
    gained: mpsc::Sender<StorePathHash>,
    /// The same numbered, and none is lost. Changed only while the names are locked for it, so that both agree.
    gains: Mutex<Gains>,
    /// The number of the last one.
    latest: watch::Sender<u64>,
    /// One scan at a time. The scan itself holds it: whoever waited for it may leave.
    scanning: Arc<tokio::sync::Mutex<()>>,
    /// Changes whenever a scan has read some more.
    batches: watch::Sender<()>,
    lookers: Semaphore,
    remembered: RememberedNames,
}

#[derive(Debug, Default)]
struct Watch {
    inotify: Option<Arc<OwnedFd>>,
    /// The directory has to be read whole: never was, or events were lost.
    stale: bool,
    scanned: Option<(Instant, Option<SystemTime>)>,
    /// When a scan failed last: the next one waits a little.
    failed: Option<Instant>,
}

impl Names {
    /// Nothing is read yet: the first question, or [`Names::follow`], does.
    pub(super) fn new(
        directory: PathBuf,
        remembered: RememberedNames,
        metrics: StoreMetrics,
        gained: mpsc::Sender<StorePathHash>,
    ) -> Self {
        let watch = Mutex::new(Watch { stale: true, ..Watch::default() });
        let (names, read, scanning) = (RwLock::default(), RwLock::default(), Arc::default());
        let (gains, latest, batches) = (Mutex::default(), watch::Sender::default(), watch::Sender::default());
        let lookers = Semaphore::new(LOOKERS);
        Self {
            directory,
            metrics,
            names,
            read,
            watch,
            gained,
            gains,
            latest,
            scanning,
            batches,
            lookers,
            remembered,
        }
    }

    /// A name for this hash part as soon as one is known while the directory is read, or the one that it had when the daemon ended
    /// last: it may be gone, or another one may be the path's. `None`: there is no scan, or it has ended; ask [`Names::find`].
    pub(super) async fn find_early(self: &Arc<Self>, hash: &StorePathHash) -> Option<StorePath> {
        if !self.take_in_events() {
            return None;
        }
        let mut batches = self.batches.subscribe();
        let known = async {
            // A lock's path may be about to be read.
            if let Some(path) = self.names().path(hash).filter(|path| !is_lock(path)) {
                return Some(path);
            }
            let _place = self.lookers.try_acquire().ok()?;
            let mut seen = 0;
            loop {
                {
                    let read = self.read();
                    // Another scan may have begun.
                    seen = seen.min(read.len());
                    if let Some(path) = read.path(hash, seen) {
                        return Some(path);
                    }
                    seen = read.len();
                }
                batches.changed().await.ok()?;
            }
        };
        let is_first = self.watch().scanned.is_none();
        let remembered = async { if is_first { self.remembered.find(hash).await } else { None } };
        tokio::select! {
            // First, so that it is begun in any case.
            biased;
            () = self.scan() => None,
            Some(known) = known => Some(known),
            Some(remembered) = remembered => Some(remembered),
        }
    }

    /// The store path with this hash part, if the directory has such a name.
    pub(super) async fn find(self: &Arc<Self>, hash: &StorePathHash) -> Option<StorePath> {
        // Also when there is a name already: it may be the lock of the path that has come since.
        if self.take_in_events() {
            self.scan().await;
        }
        self.names().path(hash)
    }

    /// Writes down what is known for [`Names::find_early`] after the next start. Nothing if it was never read. Blocking.
    pub(super) fn remember(&self) -> std::io::Result<()> {
        if self.watch().scanned.is_none() {
            return Ok(());
        }
        let hashes = self.names().hashes().copied().collect();
        let path = |hash: &StorePathHash| self.names().path(hash).filter(|path| !is_lock(path));
        self.remembered.save(hashes, path)
    }

    /// Waits for the end of the first scan.
    pub(super) async fn read_once(self: &Arc<Self>) {
        if self.watch().scanned.is_none() {
            self.scan().await;
        }
    }

    /// Whether the directory has no such name. False also where only a scan could tell.
    pub(super) fn lacks(&self, hash: &StorePathHash) -> bool {
        // After a scan that failed nothing is scanned for a while, which is no answer: the names may be old, or none yet.
        let can_tell = !self.take_in_events() && !self.watch().stale;
        can_tell && !self.names().contains(hash)
    }

    /// The hash parts of all names, and the number of the last gain among them. `None`: the directory was never read.
    pub(super) async fn all(self: &Arc<Self>) -> Option<(Vec<StorePathHash>, u64)> {
        if self.take_in_events() {
            self.scan().await;
        }
        self.watch().scanned?;
        let names = self.names();
        let number = self.gains().number();
        Some((names.hashes().copied().collect(), number))
    }

    /// What came after the gain with this number, and the number of the last one. `None`: nobody knows any more.
    pub(super) fn gained_since(&self, number: u64) -> Option<(Vec<StorePathHash>, u64)> {
        let gains = self.gains();
        Some((gains.since(number)?, gains.number()))
    }

    /// The number of the last gain.
    pub(super) fn latest(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    /// Takes in events as they come, so that none are lost while nobody asks. Ends when dropped.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut looked = Instant::now();
        let mut watched: Option<AsyncFd<Arc<OwnedFd>>> = None;
        loop {
            let is_due = looked.elapsed() >= LOOK_PERIOD;
            if is_due {
                looked = Instant::now();
            }
            if self.take_in_events() || (is_due && self.changed_unseen()) {
                self.scan().await;
            }
            let inotify = self.watch().inotify.clone();
            let same = |watched: &AsyncFd<Arc<OwnedFd>>| {
                inotify.as_ref().is_some_and(|inotify| Arc::ptr_eq(inotify, watched.get_ref()))
            };
            if !watched.as_ref().is_some_and(same) {
                watched = inotify.and_then(wakes);
            }
            let Some(watched) = &watched else {
                sleep(FOLLOW_PERIOD).await;
                continue;
            };
            sleep(GATHER).await;
            if let Ok(Ok(mut events)) = timeout(LOOK_PERIOD, watched.readable()).await {
                // Before they are taken in: what comes after that wakes it once more.
                events.clear_ready();
            }
        }
    }

    fn names(&self) -> RwLockReadGuard<'_, NameMap> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn names_to_change(&self) -> RwLockWriteGuard<'_, NameMap> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> RwLockReadGuard<'_, NameList> {
        self.read.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_to_change(&self) -> RwLockWriteGuard<'_, NameList> {
        self.read.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn gains(&self) -> MutexGuard<'_, Gains> {
        self.gains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the events that wait. True: the directory has to be scanned.
    fn take_in_events(&self) -> bool {
        let mut watch = self.watch();
        if watch.failed.is_some_and(|at| at.elapsed() < SCAN_PAUSE) {
            return false;
        }
        let Some(inotify) = watch.inotify.as_ref() else {
            let pause = watch.scanned.is_some_and(|(at, _)| at.elapsed() < SCAN_PAUSE);
            return watch.stale || (!pause && self.is_newer_than(watch.scanned));
        };
        let events = waiting_events(inotify);
        if events.any {
            // What has been told by events is no reason for a scan.
            let modified = modified(&self.directory);
            watch.scanned = watch.scanned.map(|(at, _)| (at, modified));
        }
        // Still under the lock of the watch: two readers must not swap the order of their events.
        self.apply(events.changes);
        if events.lost {
            watch.inotify = None;
            watch.stale = true;
        }
        watch.stale
    }

    fn apply(&self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let mut names = self.names_to_change();
        for change in changes {
            self.tell(&change);
            match change {
                Change::Appeared(path) => names.insert(&path),
                Change::Disappeared(path) => names.remove(&path),
            }
        }
        self.metrics.names.set(names.len() as i64);
        self.latest.send_replace(self.gains().number());
    }

    /// A path is there when its name comes, and valid when its lock goes.
    fn tell(&self, change: &Change) {
        let (path, told) = match change {
            Change::Appeared(path) => (path, !is_lock(path)),
            Change::Disappeared(path) => (path, is_lock(path)),
        };
        if told {
            self.gains().add(StorePathHash::of(path));
            let _ = self.gained.try_send(StorePathHash::of(path));
        }
    }

    /// Reads the directory whole, once however many ask at the same time. Goes on where it is dropped midway.
    async fn scan(self: &Arc<Self>) {
        let one = Arc::clone(&self.scanning).lock_owned().await;
        {
            let watch = self.watch();
            if !watch.stale && !self.is_newer_than(watch.scanned) {
                return;
            }
        }
        let names = Arc::clone(self);
        // Panics are the only way in which it fails, and there are none to be had.
        let _ = tokio::task::spawn_blocking(move || {
            names.scan_now();
            drop(one);
        })
        .await;
    }

    fn scan_now(&self) {
        // The watch comes first: what changes while the directory is read waits as an event.
        let inotify = watch_directory(&self.directory)
            .inspect_err(|error| {
                let directory = self.directory.display();
                tracing::debug!(%directory, %error, "no watch on the store: it is scanned instead");
            })
            .ok();
        let modified = modified(&self.directory);
        *self.read_to_change() = NameList::default();
        let read = read_names(&self.directory, |batch| {
            self.read_to_change().append(batch);
            self.batches.send_replace(());
        });
        let list = std::mem::take(&mut *self.read_to_change());
        if let Err(error) = read {
            let directory = self.directory.display();
            tracing::warn!(%directory, %error, "the store can't be read; what was known of it stays, and it is tried again");
            self.watch().failed = Some(Instant::now());
            return;
        }
        let fresh = NameMap::from(list);
        let mut watch = self.watch();
        let mut names = self.names_to_change();
        if watch.scanned.is_none() {
            self.gains().skip(fresh.len());
        } else {
            // What came and no event told of; a hash part that was there as a lock may be a path by now.
            for hash in fresh.came_since(&names) {
                self.gains().add(*hash);
                let _ = self.gained.try_send(*hash);
            }
        }
        *names = fresh;
        self.metrics.scans.inc();
        self.metrics.names.set(names.len() as i64);
        drop(names);
        self.latest.send_replace(self.gains().number());
        *watch = Watch {
            inotify: inotify.map(Arc::new),
            stale: false,
            scanned: Some((Instant::now(), modified)),
            failed: None,
        };
    }

    /// Whether the directory changed and no event said so.
    fn changed_unseen(&self) -> bool {
        !self.take_in_events() && self.is_newer_than(self.watch().scanned)
    }

    fn is_newer_than(&self, scanned: Option<(Instant, Option<SystemTime>)>) -> bool {
        scanned.is_none_or(|(_, before)| modified(&self.directory) != before)
    }
}

fn modified(directory: &Path) -> Option<SystemTime> {
    std::fs::metadata(directory).and_then(|meta| meta.modified()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn every_path_is_in_the_whole_or_among_the_gains_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path();
        let (sender, mut told) = mpsc::channel(10_000);
        let names =
            Arc::new(Names::new(store.to_owned(), RememberedNames::new(None), Metrics::new().store, sender));
        let hash = |number: u32| StorePathHash::parse(format!("{number:0>32}").as_bytes()).unwrap();
        let writer = {
            let store = store.to_owned();
            std::thread::spawn(move || {
                for number in 0..2000 {
                    std::fs::write(store.join(format!("{number:0>32}-x.lock")), "").unwrap();
                    std::fs::write(store.join(format!("{number:0>32}-x")), "").unwrap();
                }
            })
        };
        let mut snapshots = Vec::new();
        while !writer.is_finished() {
            snapshots.push(names.all().await.unwrap());
            // As after lost events: a scan, in which a lock may have become a path.
            names.watch().stale = true;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        writer.join().unwrap();
        let (last, number) = names.all().await.unwrap();
        assert_eq!(last.len(), 2000);
        assert_eq!(*names.latest().borrow(), number);
        for (mut all, number) in snapshots {
            all.extend(names.gained_since(number).unwrap().0);
            let all: std::collections::HashSet<_> = all.into_iter().collect();
            assert!((0..2000).all(|number| all.contains(&hash(number))));
        }
        told.close();
        assert!(told.recv().await.is_some());
    }

    #[tokio::test]
    async fn a_name_is_a_hint_as_soon_as_it_was_read_and_a_miss_waits_for_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let hash = |digit: &str| StorePathHash::parse(digit.repeat(32).as_bytes()).unwrap();
        let path = |name: &str| StorePath::from_basename(name.as_bytes()).unwrap();
        let state = tempfile::tempdir().unwrap();
        let remembered = RememberedNames::new(Some(state.path()));
        let two = path(&format!("{}-before", "2".repeat(32)));
        remembered.save(vec![hash("2")], |_| Some(two.clone())).unwrap();
        let names = Arc::new(Names::new(
            folder.path().to_owned(),
            remembered,
            Metrics::new().store,
            mpsc::channel(1).0,
        ));
        // A scan that has begun and is not at its end.
        let scan = Arc::clone(&names.scanning).lock_owned().await;
        let read = |name: &str| {
            names.read_to_change().push(hash("0"), name.as_bytes());
            names.batches.send_replace(());
        };
        let (zero, one) = (hash("0"), hash("1"));
        let (mut hit, mut miss) = (Box::pin(names.find_early(&zero)), Box::pin(names.find_early(&one)));
        assert!(waits(&mut hit).await && waits(&mut miss).await);
        assert_eq!(names.find_early(&StorePathHash::of(&two)).await, Some(two));
        read("text.lock");
        assert!(waits(&mut hit).await);
        read("text");
        assert_eq!(hit.await.unwrap().name(), "text");
        assert!(waits(&mut miss).await && !names.lacks(&one) && !names.lacks(&zero));
        drop(scan);
        // What is there really is read now.
        assert!(miss.await.is_none() && names.lacks(&one));
        assert!(names.lacks(&zero) && names.find(&zero).await.is_none());
        // No scan is under way: there is nothing to be had early.
        assert!(names.find_early(&zero).await.is_none());
        // What is remembered from now on is what was read.
        names.remember().unwrap();
        assert!(RememberedNames::new(Some(state.path())).find(&hash("2")).await.is_none());
    }

    async fn waits(future: &mut (impl Future + Unpin)) -> bool {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context).is_pending())
        })
        .await
    }

    #[tokio::test]
    async fn a_scan_that_fails_leaves_what_was_known_and_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let (store, aside) = (folder.path().join("store"), folder.path().join("aside"));
        let part = "0".repeat(32);
        let hash = StorePathHash::parse(part.as_bytes()).unwrap();
        std::fs::create_dir(&store).unwrap();
        std::fs::write(store.join(format!("{part}-text")), "").unwrap();
        let names = Arc::new(Names::new(
            store.clone(),
            RememberedNames::new(None),
            Metrics::new().store,
            mpsc::channel(1).0,
        ));
        assert!(names.find(&hash).await.is_some());
        // The directory goes away (which the watch tells), and what is there can't be read as one.
        std::fs::rename(&store, &aside).unwrap();
        std::fs::write(&store, "no directory").unwrap();
        assert!(names.find(&hash).await.is_some());
        assert!(names.watch().stale);
        assert!(!names.lacks(&StorePathHash::parse("1".repeat(32).as_bytes()).unwrap()));
        std::fs::remove_file(&store).unwrap();
        std::fs::rename(&aside, &store).unwrap();
        std::fs::remove_file(store.join(format!("{part}-text"))).unwrap();
        names.watch().failed = None;
        assert!(names.find(&hash).await.is_none());
    }

    #[tokio::test]
    async fn a_directory_that_was_never_read_lacks_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        std::fs::write(&store, "no directory").unwrap();
        let hash = StorePathHash::parse("0".repeat(32).as_bytes()).unwrap();
        let names = Arc::new(Names::new(
            store.clone(),
            RememberedNames::new(None),
            Metrics::new().store,
            mpsc::channel(1).0,
        ));
        assert!(!names.lacks(&hash));
        assert!(names.find(&hash).await.is_none());
        assert!(!names.lacks(&hash), "the scan failed");
        std::fs::remove_file(&store).unwrap();
        std::fs::create_dir(&store).unwrap();
        names.watch().failed = None;
        assert!(names.find(&hash).await.is_none());
        assert!(names.lacks(&hash));
    }
}
