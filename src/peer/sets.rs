//! What the peers hold, as far as they tell: who need not be asked for a path.
//!
//! A set is kept only while its peer keeps answering for it (`peer::follow`); a peer without one is asked.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::Semaphore;

use super::path_set::{PathSet, Told};
use super::record::PeerId;
use crate::metrics::PeerMetrics;
use crate::nix::StorePathHash;

/// Memory for all sets, in bytes: who does not fit in is asked.
const MAX_BYTES: usize = 64 * 1024 * 1024;
/// Sets that are read whole at the same time.
const READING: usize = 4;
/// How long a peer may leave the question open that waits for its next gain.
pub const WAIT: Duration = Duration::from_secs(20);
/// How much longer than that its answer may take.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(5);
/// A little more than any answer may take. An older set is one from before this host slept: its peer is asked.
const BELIEVED: Duration = WAIT.saturating_add(ANSWER_TIME).saturating_add(Duration::from_secs(1));

/// The sets.
#[derive(Debug)]
pub(super) struct Sets {
    sets: RwLock<HashMap<PeerId, Kept>>,
    reading: Semaphore,
    metrics: PeerMetrics,
}

#[derive(Debug)]
struct Kept {
    set: PathSet,
    /// When its peer last answered for it, by [`now`].
    heard: Duration,
}

/// What the sets say of one path: one look at the lock and at the clock for all peers, which are many. Between them these would
/// keep the processor from reading several filters at a time.
pub(super) struct SetsOf<'a> {
    sets: RwLockReadGuard<'a, HashMap<PeerId, Kept>>,
    hash: StorePathHash,
    now: Duration,
}

impl SetsOf<'_> {
    /// Whether the peer says that it does not have the path.
    pub(super) fn denies(&self, id: &PeerId) -> bool {
        let is_fresh = |kept: &&Kept| self.now.saturating_sub(kept.heard) < BELIEVED;
        self.sets.get(id).filter(is_fresh).is_some_and(|kept| !kept.set.may_contain(&self.hash))
    }
}

/// A clock that does not stand still while the host sleeps.
fn now() -> Duration {
    clock_gettime(ClockId::Boottime).try_into().unwrap_or_default()
}

impl Sets {
    pub(super) fn new(metrics: PeerMetrics) -> Self {
        Self { sets: RwLock::default(), reading: Semaphore::new(READING), metrics }
    }

    /// What they all say of a path. No set changes until this is dropped.
    pub(super) fn of(&self, hash: StorePathHash) -> SetsOf<'_> {
        SetsOf { sets: self.read(), hash, now: now() }
    }

    /// Places for those that read a long answer.
    pub(super) fn reading(&self) -> &Semaphore {
        &self.reading
    }

    /// What is known of a peer, in its own words.
    pub(super) fn version(&self, id: &PeerId) -> Option<String> {
        self.read().get(id).map(|kept| kept.set.version())
    }

    /// The peer has nothing more to tell.
    pub(super) fn heard(&self, id: &PeerId) {
        if let Some(kept) = self.write().get_mut(id) {
            kept.heard = now();
        }
    }

    /// The peer told. False: it does not follow what was known, or there is no room for it.
    pub(super) fn take(&self, id: &PeerId, told: Told) -> bool {
        let mut sets = self.write();
        if told.filter.is_none() {
            let known = sets.get_mut(id);
            return known.is_some_and(|kept| {
                kept.heard = now();
                kept.set.add(&told)
            });
        }
        let Some(set) = PathSet::new(told) else { return false };
        sets.remove(id);
        let bytes = sets.values().map(|kept| kept.set.weight()).sum::<usize>() + set.weight();
        if bytes <= MAX_BYTES {
            sets.insert(id.clone(), Kept { set, heard: now() });
        }
        self.count(&sets);
        bytes <= MAX_BYTES
    }

    /// The peer is said to have these.
    pub(super) fn hint(&self, id: &PeerId, hashes: &[StorePathHash]) {
        if let Some(kept) = self.write().get_mut(id) {
            kept.set.hint(hashes);
        }
    }

    /// The peer does not answer for its set any more.
    pub(super) fn remove(&self, id: &PeerId) {
        let mut sets = self.write();
        sets.remove(id);
        self.count(&sets);
    }

    fn count(&self, sets: &HashMap<PeerId, Kept>) {
        self.metrics.holdings_known.set(i64::try_from(sets.len()).unwrap_or(i64::MAX));
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<PeerId, Kept>> {
        self.sets.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<PeerId, Kept>> {
        self.sets.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::path_filter::PathFilter;
    use super::*;

    fn hash(number: u8) -> StorePathHash {
        StorePathHash::from_bytes([number; 20])
    }

    fn told(number: u64, gains: &[StorePathHash], filter: Option<PathFilter>) -> Told {
        Told { instance: 1, number, gains: gains.to_vec(), filter }
    }

    #[test]
    fn who_has_no_set_is_asked_and_who_told_of_a_path_too() {
        let (sets, id) = (Sets::new(PeerMetrics::default()), PeerId::instance("a"));
        assert!(!sets.of(hash(1)).denies(&id));
        assert!(!sets.take(&id, told(1, &[hash(1)], None)));
        assert!(sets.take(&id, told(1, &[], PathFilter::new(&[hash(1)]))));
        let denied: Vec<u8> = (2..40).filter(|number| sets.of(hash(*number)).denies(&id)).collect();
        assert!(!sets.of(hash(1)).denies(&id) && denied.len() > 30);
        sets.hint(&id, &[hash(denied[0])]);
        assert!(sets.take(&id, told(2, &[hash(denied[1])], None)));
        assert!(denied[..2].iter().all(|number| !sets.of(hash(*number)).denies(&id)));
        assert!(sets.of(hash(denied[2])).denies(&id));
        // The host slept, and the peer did not answer since.
        assert!(!SetsOf { now: now() + BELIEVED, ..sets.of(hash(denied[2])) }.denies(&id));
        sets.remove(&id);
        assert!(!sets.of(hash(denied[2])).denies(&id));
    }

    #[test]
    fn all_sets_together_are_bounded() {
        let sets = Sets::new(PeerMetrics::default());
        let many: Vec<StorePathHash> = (0..1_000_000_u32)
            .map(|number| {
                let mut bytes = [0; 20];
                bytes[..4].copy_from_slice(&number.to_le_bytes());
                StorePathHash::from_bytes(bytes)
            })
            .collect();
        let filter = PathFilter::new(&many);
        let weight = filter.as_ref().unwrap().weight();
        let outcomes: Vec<bool> = (0..100)
            .map(|number| sets.take(&PeerId::instance(&number.to_string()), told(0, &[], filter.clone())))
            .collect();
        let kept = outcomes.iter().take_while(|taken| **taken).count();
        assert_eq!(kept, MAX_BYTES / weight);
        assert!(outcomes[kept..].iter().all(|taken| !taken));
        assert!(!sets.of(hash(9)).denies(&PeerId::instance("99")));
    }
}
