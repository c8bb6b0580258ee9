//! The local store: which paths are valid, what is known of them, and the bytes of their NARs.
//!
//! Shells out to `nix-store --serve --write`, which lives long and is asked in batches; the bytes come from the disk
//! itself. Knows nothing of HTTP, peers or our keys. The invariant: what [`Store::path`] returns was leased before it
//! was found valid, and nothing remembered is believed without a look at the path.

mod buffers;
mod build_log;
mod child;
mod copy_file;
mod error;
mod file_span;
mod gains;
mod in_order;
mod known;
mod lease_holder;
mod lease_office;
mod leases;
mod name;
mod name_events;
mod name_list;
mod name_map;
mod names;
mod nar_chunks;
mod nar_copies;
mod nar_copy;
mod nar_head;
mod nar_read_error;
mod nar_reader;
mod nar_stream;
mod open_directory;
mod options;
mod remembered_names;
mod tree;
mod tree_error;
mod tree_part;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use moka::sync::Cache;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};

pub use buffers::{Buffer, BufferPool};
pub use build_log::LogError;
pub use child::ChildError;
pub use error::{OpenError, StoreError};
pub use file_span::FileSpan;
pub use gains::KEPT_GAINS;
pub use known::KnownPath;
pub use leases::{Lease, StoreState};
pub use nar_copies::NarCopies;
pub use nar_read_error::NarReadError;
pub use nar_stream::NarStream;
pub use options::Options;
pub use tree_error::TreeError;

use self::known::{KnownPaths, Stamp};
use self::leases::Leases;
use self::name::is_lock_file;
use self::names::Names;
use self::nar_head::NarHead;
use self::remembered_names::RememberedNames;
use crate::metrics::StoreMetrics;
use crate::nix::layout::NarLayout;
use crate::nix::{StoreDir, StorePath, StorePathHash};

/// Memory for layouts that may be asked for again, in bytes: ranges and resumed downloads ask for the same one.
const LAYOUTS_BYTES: u64 = 16 * 1024 * 1024;

/// A cheap handle on the local store.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: Options,
    store_dir: StoreDir,
    names: Arc<Names>,
    known: KnownPaths,
    leases: Leases,
    /// Layouts of NARs that were asked for, under the stamps of their paths.
    layouts: Cache<StorePathHash, (Stamp, Arc<NarLayout>)>,
    copies: NarCopies,
    pool: BufferPool,
    follower: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Store {
    /// Opens the store; `gained` is told of paths that come, and the names are remembered in the folder `state`. Returns with it
    /// the task that owns its processes and ends after the last handle does. No Nix on the machine is no error: every answer is
    /// "not here" until there is.
    pub fn open(
        options: Options,
        state: Option<&Path>,
        copies: NarCopies,
        metrics: &StoreMetrics,
        gained: mpsc::Sender<StorePathHash>,
    ) -> Result<(Self, JoinHandle<()>), OpenError> {
        let directory = options.directory();
        if !options.is_there()? {
            let directory = directory.display();
            tracing::warn!(%directory, "there is no store here yet; every path is answered with 404 until there is");
        }
        let store_dir = StoreDir::default();
        let names = Arc::new(Names::new(directory, RememberedNames::new(state), metrics.clone(), gained));
        // The process first: its start takes longer than the scan, which runs beside it, and the first answer needs both.
        let (leases, task) = lease_office::open(options.clone(), store_dir.clone(), metrics.clone());
        let (follow, sweep) = (Arc::clone(&names).follow(), copies.clone().sweep());
        let follower = tokio::spawn(async move {
            tokio::join!(follow, sweep);
        });
        let known = KnownPaths::new(options.remember.as_u64());
        let pool = BufferPool::default();
        let weigh =
            |_: &_, (_, layout): &(_, Arc<NarLayout>)| u32::try_from(layout.weight()).unwrap_or(u32::MAX);
        let layouts = Cache::builder().weigher(weigh).max_capacity(LAYOUTS_BYTES).build();
        let inner = Inner { options, store_dir, names, known, leases, layouts, copies, pool, follower };
        Ok((Self(Arc::new(inner)), task))
    }

    /// The logical store directory, which the paths begin with wherever they really lie.
    #[must_use]
    pub fn store_dir(&self) -> &StoreDir {
        &self.0.store_dir
    }

    /// The buffers for chunks of NARs, wherever these come from.
    #[must_use]
    pub fn buffers(&self) -> &BufferPool {
        &self.0.pool
    }

    /// How it goes with `nix-store`.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<StoreState> {
        self.0.leases.state()
    }

    /// Whether there is a store directory now: without one everything is "not here".
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.0.options.directory().is_dir()
    }

    /// Waits until the names in the store directory were read once, or can't be.
    pub async fn names_read(&self) {
        self.0.names.read_once().await;
    }

    /// Writes the names down, for the first questions after the next start. Without them these take longer, and that is all.
    pub async fn remember_names(&self) {
        let names = Arc::clone(&self.0.names);
        if let Ok(Err(error)) = spawn_blocking(move || names.remember()).await {
            tracing::debug!(%error, "the names in the store can't be remembered");
        }
    }

    /// The hash parts of all that may be here, and the number of the last gain among them. `None`: it can't be told.
    pub async fn all(&self) -> Option<(Vec<StorePathHash>, u64)> {
        self.0.names.all().await
    }

    /// What came after the gain with this number, and the number of the last one. `None`: that is too long ago.
    #[must_use]
    pub fn gained_since(&self, number: u64) -> Option<(Vec<StorePathHash>, u64)> {
        self.0.names.gained_since(number)
    }

    /// The number of the last gain.
    #[must_use]
    pub fn latest_gain(&self) -> watch::Receiver<u64> {
        self.0.names.latest()
    }

    /// What is remembered of a path, at the cost of one `lstat`. `None`: ask [`Store::path`].
    #[must_use]
    pub fn remembered(&self, hash: &StorePathHash) -> Option<Arc<KnownPath>> {
        let known = self.0.known.get(hash)?;
        (self.0.leases.is_current(&known.lease) && known.is_unchanged()).then_some(known)
    }

    /// Whether there surely is no such path, without waiting. False: ask [`Store::path`].
    #[must_use]
    pub fn lacks(&self, hash: &StorePathHash) -> bool {
        self.0.names.lacks(hash)
    }

    /// The valid path with this hash part, leased unless `nix-store` can't be asked now. `None`: not in this store. May be
    /// dropped midway.
    pub async fn path(&self, hash: &StorePathHash) -> Result<Option<Arc<KnownPath>>, StoreError> {
        if let Some(known) = self.remembered(hash) {
            return Ok(Some(known));
        }
        // While it is away, or hangs, nobody waits for what is at hand. It is started again all the same.
        let is_away = matches!(*self.0.leases.state().borrow(), StoreState::Unavailable(_));
        if let Some(known) = is_away.then(|| self.without_lease(hash)).flatten() {
            return Ok(Some(known));
        }
        let found = self.ask(hash).await;
        match &found {
            Ok(Some(_)) => {}
            Err(StoreError::Unavailable(_) | StoreError::Busy(_)) => {
                if let Some(known) = self.without_lease(hash) {
                    return Ok(Some(known));
                }
            }
            Ok(None) | Err(_) => self.0.known.forget(hash),
        }
        found
    }

    /// What is remembered of a path while `nix-store` can't lease it: looked at once more, and believed unless somebody is
    /// about to change it. If it is collected all the same, its NAR comes from a peer or is cut, and never ends early.
    fn without_lease(&self, hash: &StorePathHash) -> Option<Arc<KnownPath>> {
        let known = self.0.known.get(hash)?;
        (known.is_unchanged() && !known.is_locked()).then_some(known)
    }

    async fn ask(&self, hash: &StorePathHash) -> Result<Option<Arc<KnownPath>>, StoreError> {
        // A hint is worth a question: nothing is believed of it that is not found valid.
        if let Some(path) = self.0.names.find_early(hash).await
            && let Some(known) = self.ask_for(hash, path).await?
        {
            return Ok(Some(known));
        }
        let Some(path) = self.0.names.find(hash).await else { return Ok(None) };
        // A question takes a root, and that of a lock keeps the path that is being made, by their hash part.
        if is_lock_file(&path, &self.real(&path)) {
            return Ok(None);
        }
        self.ask_for(hash, path).await
    }

    async fn ask_for(
        &self,
        hash: &StorePathHash,
        path: StorePath,
    ) -> Result<Option<Arc<KnownPath>>, StoreError> {
        let real = self.real(&path);
        let Some((info, _lease, mark)) = self.0.leases.ask(path).await? else { return Ok(None) };
        // After the lease: what lies there now is what was found valid.
        let Some(stamp) = Stamp::of(&real) else { return Ok(None) };
        let known = KnownPath::new(info, real, stamp, mark);
        if let Some(before) = self.0.known.get(hash) {
            known.take_over_from(&before);
        }
        let known = Arc::new(known);
        self.0.known.insert(Arc::clone(&known));
        Ok(Some(known))
    }

    /// Where a path really lies.
    fn real(&self, path: &StorePath) -> PathBuf {
        self.0.options.directory().join(path.to_basename())
    }

    /// Forgets what is remembered of a path: the next question is answered by the store.
    pub fn forget(&self, hash: &StorePathHash) {
        self.0.known.forget(hash);
        self.0.layouts.invalidate(hash);
        self.0.copies.forget(hash);
    }

    /// The layout of a path's NAR. Its length is NarSize, or it is an error and the path is forgotten.
    pub async fn layout(&self, known: &KnownPath) -> Result<Arc<NarLayout>, StoreError> {
        self.layout_for(known, false).await
    }

    /// The same. If the path is laid out for who asks for the whole NAR, a copy of that may be begun.
    async fn layout_for(&self, known: &KnownPath, whole: bool) -> Result<Arc<NarLayout>, StoreError> {
        let hash = known.info.hash();
        let laid_out = || {
            let laid_out = self.0.layouts.get(&hash).filter(|(stamp, _)| *stamp == known.stamp);
            laid_out.map(|(_, layout)| layout)
        };
        if let Some(layout) = laid_out() {
            return Ok(layout);
        }
        // Who comes meanwhile waits for the same.
        let _one = known.laying_out.lock().await;
        if let Some(layout) = laid_out() {
            return Ok(layout);
        }
        let laid = self.lay_out(known, whole).await;
        match &laid {
            Ok(layout) => self.0.layouts.insert(hash, (known.stamp, Arc::clone(layout))),
            Err(_) => self.forget(&hash),
        }
        laid
    }

    async fn lay_out(&self, known: &KnownPath, whole: bool) -> Result<Arc<NarLayout>, StoreError> {
        let (layout, head) = match tree::lay_out_file(&known.real) {
            Some(layout) => (layout, None),
            None => {
                let mut head = if whole { self.0.copies.head(known) } else { None };
                let real = known.real.clone();
                // Gone with who waits here.
                let asked = Arc::new(());
                let asked_by = Arc::downgrade(&asked);
                let lay_out = move || {
                    let layout = tree::lay_out(&real, head.as_mut(), || asked_by.strong_count() > 0)?;
                    Ok((layout, head.and_then(NarHead::end)))
                };
                let laid = spawn_blocking(lay_out).await.map_err(|_| StoreError::Closed)?;
                laid.map_err(StoreError::Tree)?
            }
        };
        if layout.len() != known.info.nar_size {
            let (expected, found) = (known.info.nar_size, layout.len());
            return Err(StoreError::WrongSize { path: known.real.clone(), expected, found });
        }
        let layout = Arc::new(layout);
        if let Some(head) = head {
            self.0.copies.go_on(known, &layout, head, &self.0.pool);
        }
        Ok(layout)
    }

    /// The listing of a path as JSON. `None`: it has names that JSON can't say.
    pub async fn listing(&self, known: &KnownPath) -> Result<Option<Vec<u8>>, StoreError> {
        let layout = self.layout(known).await?;
        let listing = spawn_blocking(move || crate::nix::listing::listing_json(&layout));
        listing.await.map_err(|_| StoreError::Closed)
    }

    /// The bytes of a path's NAR in `range`, which has to lie within NarSize. The path stays leased while they stream.
    pub async fn nar(&self, known: &KnownPath, range: Range<u64>) -> Result<NarStream, StoreError> {
        // Before the tree is looked at: a lease that ends meanwhile would let it be deleted underneath.
        let lease = known.lease();
        let layout = self.layout_for(known, range == (0..known.info.nar_size)).await?;
        let copy = self.0.copies.of(known, &layout, &range, &self.0.pool);
        Ok(NarStream::new(self.clone(), known, layout, range, lease, copy))
    }

    /// The build log of a derivation, unpacked. `None`: there is none.
    pub async fn log(&self, derivation: &StorePath) -> Result<Option<Vec<u8>>, StoreError> {
        let (directory, derivation) = (self.0.options.log_directory(), derivation.clone());
        let limit_bytes = self.0.options.log_size.as_u64();
        let read = spawn_blocking(move || build_log::read(&directory, &derivation, limit_bytes));
        Ok(read.await.map_err(|_| StoreError::Closed)??)
    }
}
