//! What this host tells its peers of what it holds: the whole as a filter, then only what it gained since.
//!
//! The filter is made again when somebody asks for the whole and the last one is old, or has missed too many gains; the
//! names and the gains come from the store, which counts them so that no path is in neither.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::peer::{HOLDINGS_WAIT, MAX_GAINS, PathFilter, Told, known_number};
use crate::store::Store;

/// After how long a filter is made again when it is asked for: paths that are gone are in the old one.
const FILTER_AGE: Duration = Duration::from_secs(60);
/// And no more often than this.
const FILTER_PAUSE: Duration = Duration::from_secs(2);
/// Gains are gathered for so long before they are told.
const GATHER: Duration = Duration::from_millis(20);
/// Peers that wait for gains at the same time, at most; more ask for every path.
const MAX_WAITING: usize = 512;

/// `[share]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShareOptions {
    /// Whether peers are told what is held here, so that they ask for nothing else. Default true.
    pub holdings: bool,
}

impl Default for ShareOptions {
    fn default() -> Self {
        Self { holdings: true }
    }
}

/// What a peer is answered.
#[derive(Debug)]
pub enum Holdings {
    /// Nothing came since.
    AsKnown,
    /// The whole, or what came since.
    Told(Bytes),
}

/// Tells what is held. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct Share(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    is_on: bool,
    /// Which run this is: numbers of an earlier one mean nothing.
    instance: u64,
    filter: Mutex<Latest>,
    waiting: Semaphore,
    closed: watch::Sender<bool>,
}

/// The filter that was made last.
#[derive(Debug, Default)]
struct Latest {
    made: Option<Made>,
    /// When none could be made: the next one would not do better at once.
    failed: Option<Instant>,
}

/// A filter, and what was told before it.
#[derive(Clone, Debug)]
struct Made {
    filter: PathFilter,
    number: u64,
    at: Instant,
}

impl Share {
    /// Of this store, by the run of the daemon with this id. Peers that wait keep a connection each: half of all
    /// `connections` may.
    #[must_use]
    pub fn new(options: &ShareOptions, store: Store, own_id: &str, connections: usize) -> Self {
        let instance = u64::from_str_radix(own_id, 16);
        Self(Arc::new(Inner {
            store,
            is_on: options.holdings && instance.is_ok(),
            instance: instance.unwrap_or_default(),
            filter: Mutex::default(),
            waiting: Semaphore::new(MAX_WAITING.min(connections / 2)),
            closed: watch::Sender::default(),
        }))
    }

    /// Nobody waits any more: the daemon stops.
    pub fn close(&self) {
        self.0.closed.send_replace(true);
    }

    /// What is held, or what came after the version that the asker knows, which is waited for. `None`: it is not told. May
    /// be dropped midway.
    pub(super) async fn tell(&self, known: Option<&str>) -> Option<Holdings> {
        if !self.0.is_on || *self.0.closed.borrow() {
            return None;
        }
        let number = known.and_then(|known| known_number(known, self.0.instance));
        let Some(number) = number.filter(|number| self.0.store.gained_since(*number).is_some()) else {
            return self.whole().await;
        };
        let _place = self.0.waiting.try_acquire().ok()?;
        if *self.0.store.latest_gain().borrow() == number {
            self.wait_for_more(number).await;
        }
        let (gains, latest) = self.0.store.gained_since(number)?;
        if gains.is_empty() {
            return Some(Holdings::AsKnown);
        }
        self.told(latest, gains, None)
    }

    async fn wait_for_more(&self, number: u64) {
        let (mut latest, mut closed) = (self.0.store.latest_gain(), self.0.closed.subscribe());
        let more = async {
            // An error is a store that is gone: there will be no more.
            let _ = latest.wait_for(|latest| *latest != number).await;
            sleep(GATHER).await;
        };
        let wait = async {
            tokio::select! {
                () = more => {}
                _ = closed.wait_for(|closed| *closed) => {}
            }
        };
        let _ = timeout(HOLDINGS_WAIT, wait).await;
    }

    async fn whole(&self) -> Option<Holdings> {
        // A task of its own: an asker that gives up while the filter is made finds it there the next time.
        let share = self.clone();
        let Made { filter, number, .. } = tokio::spawn(async move { share.latest().await }).await.ok()??;
        let (gains, latest) = self.0.store.gained_since(number)?;
        self.told(latest, gains, Some(filter))
    }

    /// The latest filter, made anew if it is due.
    async fn latest(&self) -> Option<Made> {
        let mut latest = self.0.filter.lock().await;
        if latest.failed.is_some_and(|at| at.elapsed() < FILTER_AGE) {
            return None;
        }
        let is_due = |made: &Made| {
            let misses_many =
                self.0.store.gained_since(made.number).is_none_or(|(gains, _)| gains.len() > MAX_GAINS / 2);
            made.at.elapsed() > FILTER_AGE || (misses_many && made.at.elapsed() > FILTER_PAUSE)
        };
        if latest.made.as_ref().is_none_or(is_due) {
            latest.made = self.make().await;
            latest.failed = latest.made.is_none().then(Instant::now);
        }
        latest.made.clone()
    }

    async fn make(&self) -> Option<Made> {
        let (hashes, number) = self.0.store.all().await?;
        let made = spawn_blocking(move || PathFilter::new(&hashes));
        Some(Made { filter: made.await.ok()??, number, at: Instant::now() })
    }

    fn told(
        &self,
        number: u64,
        gains: Vec<crate::nix::StorePathHash>,
        filter: Option<PathFilter>,
    ) -> Option<Holdings> {
        let told = Told { instance: self.0.instance, number, gains, filter };
        told.to_bytes().map(Holdings::Told)
    }
}
