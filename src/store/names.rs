//! The names in the store directory, by hash part.
//!
//! A name is no proof that a path is valid, but a path that has no name is not there. The directory is watched, and
//! before any answer the events that wait are taken in: a path is found from the moment in which it appears. Lost
//! events, or no watch at all, lead to a scan of the directory.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::gains::Gains;
use crate::metrics::StoreMetrics;
use crate::nix::{StorePath, StorePathHash};

/// Without a watch, a scan is not older than this before it is made again.
const SCAN_PAUSE: Duration = Duration::from_secs(1);
/// The first event after a while is taken in at once; after it they are gathered for so long.
const GATHER: Duration = Duration::from_millis(10);
/// How often it is looked for events without a watch.
const FOLLOW_PERIOD: Duration = Duration::from_millis(250);
/// How often the directory's own time is looked at: some file systems change without events.
const LOOK_PERIOD: Duration = Duration::from_secs(60);

/// The names in the store directory.
#[derive(Debug)]
pub(super) struct Names {
    directory: PathBuf,
    metrics: StoreMetrics,
    /// A path and its `.lock` share a hash part, so there may be several names; mostly there is one.
    names: RwLock<HashMap<StorePathHash, Vec<Box<str>>>>,
    watch: Mutex<Watch>,
    /// Told of paths that have come; a queue that is full loses some, and nobody waits.
    gained: mpsc::Sender<StorePathHash>,
    /// The same numbered, and none is lost. Changed only while the names are locked for it, so that both agree.
    gains: Mutex<Gains>,
    /// The number of the last one.
    latest: watch::Sender<u64>,
    /// One scan at a time.
    scanning: tokio::sync::Mutex<()>,
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

/// What an event says of a name.
enum Change {
    Appeared(StorePath),
    Disappeared(StorePath),
}

impl Names {
    /// Nothing is read yet: the first question, or [`Names::follow`], does.
    pub(super) fn new(
        directory: PathBuf,
        metrics: StoreMetrics,
        gained: mpsc::Sender<StorePathHash>,
    ) -> Self {
        let watch = Mutex::new(Watch { stale: true, ..Watch::default() });
        let (names, scanning) = (RwLock::default(), tokio::sync::Mutex::default());
        let (gains, latest) = (Mutex::default(), watch::Sender::default());
        Self { directory, metrics, names, watch, gained, gains, latest, scanning }
    }

    /// The store path with this hash part, if the directory has such a name.
    pub(super) async fn find(self: &Arc<Self>, hash: &StorePathHash) -> Option<StorePath> {
        // Also when there is a name already: it may be the lock of the path that has come since.
        if self.take_in_events() {
            self.scan().await;
        }
        self.get(hash)
    }

    /// Whether the directory has no such name. False also where only a scan could tell.
    pub(super) fn lacks(&self, hash: &StorePathHash) -> bool {
        // After a scan that failed nothing is scanned for a while, which is no answer: the names may be old, or none yet.
        let can_tell = !self.take_in_events() && !self.watch().stale;
        can_tell && !self.names.read().unwrap_or_else(PoisonError::into_inner).contains_key(hash)
    }

    /// The hash parts of all names, and the number of the last gain among them. `None`: the directory was never read.
    pub(super) async fn all(self: &Arc<Self>) -> Option<(Vec<StorePathHash>, u64)> {
        if self.take_in_events() {
            self.scan().await;
        }
        self.watch().scanned?;
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let number = self.gains().number();
        Some((names.keys().copied().collect(), number))
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

    fn get(&self, hash: &StorePathHash) -> Option<StorePath> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        // The shortest is the path; the longer ones are its lock and its like.
        let name = names.get(hash)?.iter().min_by_key(|name| name.len())?;
        StorePath::from_basename(format!("{hash}-{name}").as_bytes()).ok()
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
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            self.tell(&change);
            match change {
                Change::Appeared(path) => insert(&mut names, &path),
                Change::Disappeared(path) => {
                    let hash = StorePathHash::of(&path);
                    if let Some(there) = names.get_mut(&hash) {
                        there.retain(|name| **name != *path.name());
                        if there.is_empty() {
                            names.remove(&hash);
                        }
                    }
                }
            }
        }
        self.metrics.names.set(names.len() as i64);
        self.latest.send_replace(self.gains().number());
    }

    /// A path is there when its name comes, and valid when its lock goes.
    fn tell(&self, change: &Change) {
        let (path, told) = match change {
            Change::Appeared(path) => (path, !path.name().ends_with(".lock")),
            Change::Disappeared(path) => (path, path.name().ends_with(".lock")),
        };
        if told {
            self.gains().add(StorePathHash::of(path));
            let _ = self.gained.try_send(StorePathHash::of(path));
        }
    }

    /// Reads the directory whole, once however many ask at the same time.
    async fn scan(self: &Arc<Self>) {
        let _one = self.scanning.lock().await;
        {
            let watch = self.watch();
            if !watch.stale && !self.is_newer_than(watch.scanned) {
                return;
            }
        }
        let names = Arc::clone(self);
        // Panics are the only way in which it fails, and there are none to be had.
        let _ = tokio::task::spawn_blocking(move || names.scan_now()).await;
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
        let fresh = match read_names(&self.directory) {
            Ok(fresh) => fresh,
            Err(error) => {
                let directory = self.directory.display();
                tracing::warn!(%directory, %error, "the store can't be read; what was known of it stays, and it is tried again");
                self.watch().failed = Some(Instant::now());
                return;
            }
        };
        let mut watch = self.watch();
        self.metrics.scans.inc();
        self.metrics.names.set(fresh.len() as i64);
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        // What came and no event told of; a hash part that was there as a lock may be a path by now.
        let came = fresh.iter().filter(|(hash, now)| {
            names.get(hash).is_none_or(|before| now.iter().any(|name| !before.contains(name)))
        });
        for (hash, _) in came {
            self.gains().add(*hash);
            if watch.scanned.is_some() {
                let _ = self.gained.try_send(*hash);
            }
        }
        *names = fresh;
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

/// The events that waited.
#[derive(Default)]
struct Events {
    changes: Vec<Change>,
    /// Whether there were any, also such as say nothing of a path.
    any: bool,
    /// Whether some were lost, or the directory itself went away.
    lost: bool,
}

/// Wakes who waits for events.
#[expect(deprecated, reason = "an owned descriptor stays what it is; what is to be used instead is unsafe")]
fn wakes(inotify: Arc<OwnedFd>) -> Option<AsyncFd<Arc<OwnedFd>>> {
    AsyncFd::with_interest(inotify, Interest::READABLE).ok()
}

fn waiting_events(inotify: &OwnedFd) -> Events {
    let gone = ReadFlags::QUEUE_OVERFLOW
        | ReadFlags::IGNORED
        | ReadFlags::DELETE_SELF
        | ReadFlags::MOVE_SELF
        | ReadFlags::UNMOUNT;
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let mut events = Events::default();
    loop {
        match reader.next() {
            Ok(event) => {
                events.any = true;
                events.lost |= event.events().intersects(gone);
                events.changes.extend(change(event.events(), event.file_name()));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return events,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => {
                events.lost = true;
                return events;
            }
        }
    }
}

/// The names in the directory. One that is not there has none; one that can't be read is an error.
fn read_names(directory: &Path) -> std::io::Result<HashMap<StorePathHash, Vec<Box<str>>>> {
    let mut names = HashMap::new();
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(names),
        Err(error) => return Err(error),
    };
    for entry in entries {
        if let Some(path) = entry?.file_name().to_str().and_then(basename) {
            insert(&mut names, &path);
        }
    }
    Ok(names)
}

fn insert(names: &mut HashMap<StorePathHash, Vec<Box<str>>>, path: &StorePath) {
    let there = names.entry(StorePathHash::of(path)).or_insert_with(|| Vec::with_capacity(1));
    if !there.iter().any(|name| **name == *path.name()) {
        there.push(path.name().into());
    }
}

fn change(events: ReadFlags, name: Option<&std::ffi::CStr>) -> Option<Change> {
    let path = basename(name?.to_str().ok()?)?;
    if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
        Some(Change::Appeared(path))
    } else if events.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
        Some(Change::Disappeared(path))
    } else {
        None
    }
}

/// `.links`, temporary files and the like are no store paths.
fn basename(name: &str) -> Option<StorePath> {
    StorePath::from_basename(name.as_bytes()).ok()
}

fn modified(directory: &Path) -> Option<SystemTime> {
    std::fs::metadata(directory).and_then(|meta| meta.modified()).ok()
}

fn watch_directory(directory: &Path) -> rustix::io::Result<OwnedFd> {
    let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let what = WatchFlags::CREATE
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE
        | WatchFlags::MOVED_FROM
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR;
    inotify::add_watch(&inotify, directory, what)?;
    Ok(inotify)
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
        let names = Arc::new(Names::new(store.to_owned(), Metrics::new().store, sender));
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
    async fn a_scan_that_fails_leaves_what_was_known_and_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let (store, aside) = (folder.path().join("store"), folder.path().join("aside"));
        let part = "0".repeat(32);
        let hash = StorePathHash::parse(part.as_bytes()).unwrap();
        std::fs::create_dir(&store).unwrap();
        std::fs::write(store.join(format!("{part}-text")), "").unwrap();
        let names = Arc::new(Names::new(store.clone(), Metrics::new().store, mpsc::channel(1).0));
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
        let names = Arc::new(Names::new(store.clone(), Metrics::new().store, mpsc::channel(1).0));
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
