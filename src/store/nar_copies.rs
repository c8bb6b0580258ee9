//! Copies of NARs of many small files, so that whoever asks next need not wait for thousands of files to be opened.
//!
//! Each lies in one file without a name in the state folder, and mostly in the kernel's page cache. It is made once, by a task of its
//! own, at the pace of the disk, and all who ask meanwhile follow it: a slow client holds up nobody. What is in it was read while the path was leased, from
//! files that were what they had been when they were laid out. No copy, or one that fails, is no harm: the tree is read then.

use std::fs::File;
use std::future::poll_fn;
use std::io::IoSliceMut;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use rustix::io::{Errno, ReadWriteFlags};
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;

use super::buffers::{BufferPool, CHUNK};
use super::file_span::FileSpan;
use super::known::{KnownPath, Stamp};
use super::leases::Lease;
use super::nar_chunks::NarChunks;
use super::nar_reader::NarReader;
use crate::nix::StorePathHash;
use crate::nix::layout::NarLayout;

/// Only where an entry has fewer bytes than this on average; larger files are read as fast from where they are.
const SMALL_FILES: u64 = 16 * 1024;
/// A shorter NAR is read in no time from its tree.
const SHORTEST: u64 = 4 * 1024 * 1024;
/// One NAR may take so much of the room.
const LARGEST_SHARE: u64 = 4;
/// How many there are at most: each is an open file.
const MOST: u64 = 64;
/// Copies that are made at the same time.
const MAKERS: usize = 2;
/// How long nothing is copied after a copy failed: a full disk stays full for a while.
const PAUSE: Duration = Duration::from_secs(60);
/// A copy that nobody asks for is let go.
const IDLE: Duration = Duration::from_secs(3600);

/// The copies. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct NarCopies(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    capacity: u64,
    copies: Cache<StorePathHash, (Stamp, Arc<NarCopy>)>,
    /// One at a time looks and begins. With it: when a copy failed last.
    beginning: Mutex<Option<Instant>>,
    makers: Arc<Semaphore>,
}

/// One copy, whole or in the making.
#[derive(Debug)]
pub(super) struct NarCopy {
    len: u64,
    /// Closed before its end by a maker that failed.
    progress: watch::Receiver<Progress>,
}

#[derive(Clone, Debug, Default)]
struct Progress {
    file: Option<Arc<File>>,
    /// So many bytes from the beginning are there.
    ready: u64,
}

/// The copy has no more than was given out: its maker failed, or it can't be read.
#[derive(Debug)]
pub(super) struct Gone;

impl NarCopies {
    /// Copies of `capacity` bytes in all, in a folder that may come to be later. 0, or no folder: none at all.
    #[must_use]
    pub fn new(folder: Option<PathBuf>, capacity: u64) -> Self {
        let folder = folder.filter(|_| capacity > 0);
        Self(folder.map(|folder| {
            let weigh =
                |_: &_, (_, copy): &(_, Arc<NarCopy>)| u32::try_from(copy.len / 1024).unwrap_or(u32::MAX);
            let copies = Cache::builder().weigher(weigh).max_capacity(capacity / 1024).time_to_idle(IDLE);
            let copies = copies.eviction_policy(EvictionPolicy::lru()).build();
            let makers = Arc::new(Semaphore::new(MAKERS));
            Arc::new(Inner { folder, capacity, copies, beginning: Mutex::default(), makers })
        }))
    }

    /// The copy that has `from` already; one is begun where it is worth it. `None`: read the tree.
    pub(super) fn of(
        &self,
        known: &KnownPath,
        layout: &Arc<NarLayout>,
        from: u64,
        pool: &BufferPool,
    ) -> Option<Arc<NarCopy>> {
        let inner = self.0.as_ref().filter(|inner| inner.is_worth_it(layout))?;
        let hash = known.info.hash();
        let mut failed = inner.beginning.lock().unwrap_or_else(PoisonError::into_inner);
        let there = inner.copies.get(&hash).filter(|(stamp, _)| *stamp == known.stamp);
        if let Some((_, copy)) = there {
            if !copy.has_failed() {
                let ready = copy.progress.borrow().ready;
                return (ready >= from).then_some(copy);
            }
            inner.copies.invalidate(&hash);
            *failed = Some(Instant::now());
        }
        if from > 0 || failed.is_some_and(|at| at.elapsed() < PAUSE) {
            return None;
        }
        let (place, lease) = (Arc::clone(&inner.makers).try_acquire_owned().ok()?, known.lease()?);
        let (sender, progress) = watch::channel(Progress::default());
        let reader = NarReader::new(known.real.clone(), Arc::clone(layout), 0..layout.len());
        let (folder, pool) = (inner.folder.clone(), pool.clone());
        tokio::spawn(async move {
            make(folder, reader, pool, sender, lease).await;
            drop(place);
        });
        let copy = Arc::new(NarCopy { len: layout.len(), progress });
        inner.copies.insert(hash, (known.stamp, Arc::clone(&copy)));
        Some(copy)
    }

    pub(super) fn forget(&self, hash: &StorePathHash) {
        if let Some(inner) = &self.0 {
            inner.copies.invalidate(hash);
        }
    }
}

impl Inner {
    fn is_worth_it(&self, layout: &NarLayout) -> bool {
        let len = layout.len();
        let fits = (SHORTEST.max(self.capacity / MOST)..=self.capacity / LARGEST_SHARE).contains(&len);
        fits && len / layout.entries() < SMALL_FILES
    }
}

/// Reads the tree into a file. Whatever fails ends it, and those who follow read on from the tree.
async fn make(
    folder: PathBuf,
    reader: NarReader,
    pool: BufferPool,
    progress: watch::Sender<Progress>,
    lease: Lease,
) {
    let (_lease, shown) = (lease, folder.clone());
    let file = match spawn_blocking(move || tempfile::tempfile_in(folder)).await {
        Ok(Ok(file)) => Arc::new(file),
        Ok(Err(error)) => {
            tracing::debug!(directory = %shown.display(), %error, "no file for the copy of a NAR can be made");
            return;
        }
        Err(_) => return,
    };
    let mut chunks = NarChunks::new(reader, pool).copied_to(Arc::clone(&file));
    let mut ready = 0;
    while let Some(chunk) = poll_fn(|context| chunks.poll_next(context)).await {
        match chunk {
            Ok(chunk) => ready += chunk.len() as u64,
            Err(error) => {
                tracing::debug!(%error, "a NAR is not copied");
                return;
            }
        }
        progress.send_replace(Progress { file: Some(Arc::clone(&file)), ready });
    }
}

impl NarCopy {
    fn has_failed(&self) -> bool {
        // In this order: a maker says that all is there before it leaves.
        let is_over = self.progress.has_changed().is_err();
        is_over && self.progress.borrow().ready < self.len
    }

    /// The beginning of a range, if it is there and need not be read here.
    pub(super) fn span(&self, range: &Range<u64>) -> Option<FileSpan> {
        let Progress { file, ready } = self.progress.borrow().clone();
        FileSpan::in_memory(&file?, range.start..range.end.min(ready))
    }

    /// The chunks of a range, each as soon as it is there.
    pub(super) fn chunks(
        &self,
        range: Range<u64>,
        pool: BufferPool,
    ) -> BoxStream<'static, Result<Bytes, Gone>> {
        let begun = (self.progress.clone(), range, pool);
        stream::try_unfold(begun, |(mut progress, range, pool)| async move {
            if range.is_empty() {
                return Ok(None);
            }
            let there = progress.wait_for(|progress| progress.ready > range.start).await;
            let Progress { file, ready } = there.map_err(|_| Gone)?.clone();
            let file = file.ok_or(Gone)?;
            let chunk = read(&file, range.start..range.end.min(ready), &pool).await?;
            let range = range.start + chunk.len() as u64..range.end;
            Ok(Some((chunk, (progress, range, pool))))
        })
        .boxed()
    }
}

/// Reads from the beginning of a range: here and now what is in memory, else by a blocking task.
async fn read(file: &Arc<File>, range: Range<u64>, pool: &BufferPool) -> Result<Bytes, Gone> {
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(CHUNK);
    let mut buffer = pool.take();
    let mut slices = [IoSliceMut::new(&mut buffer[..len])];
    match rustix::io::preadv2(file, &mut slices, range.start, ReadWriteFlags::NOWAIT) {
        Ok(read) if read > 0 => return Ok(pool.share(buffer, read)),
        Ok(_) => return Err(Gone),
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => {}
        Err(_) => return Err(Gone),
    }
    let (file, pool) = (Arc::clone(file), pool.clone());
    let read = spawn_blocking(move || {
        file.read_exact_at(&mut buffer[..len], range.start).map(|()| pool.share(buffer, len))
    });
    read.await.map_err(|_| Gone)?.map_err(|_| Gone)
}
