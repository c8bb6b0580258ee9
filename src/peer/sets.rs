//! What the peers hold, as far as they tell: who need not be asked for a path.
//!
//! A set is kept only while its peer keeps answering for it (`peer::follow`); a peer without one is asked.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::path_set::{PathSet, Told};
use super::record::PeerId;
use crate::metrics::PeerMetrics;
use crate::nix::StorePathHash;

/// Memory for all sets, in bytes: who does not fit in is asked.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// What became of what a peer told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// It is known now.
    Kept,
    /// It does not follow what was known: the whole is needed.
    Unfitting,
    /// There is no room for it.
    Full,
}

/// The sets.
#[derive(Debug, Default)]
pub(super) struct Sets {
    sets: RwLock<HashMap<PeerId, PathSet>>,
    metrics: PeerMetrics,
}

impl Sets {
    pub(super) fn new(metrics: PeerMetrics) -> Self {
        Self { sets: RwLock::default(), metrics }
    }

    /// Whether the peer says that it does not have the path.
    pub(super) fn denies(&self, id: &PeerId, hash: &StorePathHash) -> bool {
        self.read().get(id).is_some_and(|set| !set.may_contain(hash))
    }

    /// What is known of a peer, in its own words.
    pub(super) fn version(&self, id: &PeerId) -> Option<String> {
        self.read().get(id).map(PathSet::version)
    }

    /// The peer told.
    pub(super) fn take(&self, id: &PeerId, told: Told) -> Taken {
        let mut sets = self.write();
        if told.filter.is_none() {
            let fits = sets.get_mut(id).is_some_and(|set| set.add(&told));
            return if fits { Taken::Kept } else { Taken::Unfitting };
        }
        let Some(set) = PathSet::new(told) else { return Taken::Unfitting };
        sets.remove(id);
        let bytes = sets.values().map(PathSet::weight).sum::<usize>() + set.weight();
        if bytes <= MAX_BYTES {
            sets.insert(id.clone(), set);
        }
        self.count(&sets);
        if bytes <= MAX_BYTES { Taken::Kept } else { Taken::Full }
    }

    /// The peer is said to have these.
    pub(super) fn hint(&self, id: &PeerId, hashes: &[StorePathHash]) {
        if let Some(set) = self.write().get_mut(id) {
            set.hint(hashes);
        }
    }

    /// The peer does not answer for its set any more.
    pub(super) fn remove(&self, id: &PeerId) {
        let mut sets = self.write();
        sets.remove(id);
        self.count(&sets);
    }

    fn count(&self, sets: &HashMap<PeerId, PathSet>) {
        self.metrics.holdings_known.set(i64::try_from(sets.len()).unwrap_or(i64::MAX));
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<PeerId, PathSet>> {
        self.sets.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<PeerId, PathSet>> {
        self.sets.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::path_set::PathFilter;
    use super::*;

    fn hash(number: u8) -> StorePathHash {
        StorePathHash::from_bytes([number; 20])
    }

    fn told(number: u64, gains: &[StorePathHash], filter: Option<PathFilter>) -> Told {
        Told { instance: 1, number, gains: gains.to_vec(), filter }
    }

    #[test]
    fn who_has_no_set_is_asked_and_who_told_of_a_path_too() {
        let (sets, id) = (Sets::default(), PeerId::instance("a"));
        assert!(!sets.denies(&id, &hash(1)));
        assert_eq!(sets.take(&id, told(1, &[hash(1)], None)), Taken::Unfitting);
        assert_eq!(sets.take(&id, told(1, &[], PathFilter::new(&[hash(1)]))), Taken::Kept);
        let denied: Vec<u8> = (2..40).filter(|number| sets.denies(&id, &hash(*number))).collect();
        assert!(!sets.denies(&id, &hash(1)) && denied.len() > 30);
        sets.hint(&id, &[hash(denied[0])]);
        assert_eq!(sets.take(&id, told(2, &[hash(denied[1])], None)), Taken::Kept);
        assert!(denied[..2].iter().all(|number| !sets.denies(&id, &hash(*number))));
        assert!(sets.denies(&id, &hash(denied[2])));
        sets.remove(&id);
        assert!(!sets.denies(&id, &hash(denied[2])));
    }

    #[test]
    fn all_sets_together_are_bounded() {
        let sets = Sets::default();
        let many: Vec<StorePathHash> = (0..1_000_000_u32)
            .map(|number| {
                let mut bytes = [0; 20];
                bytes[..4].copy_from_slice(&number.to_le_bytes());
                StorePathHash::from_bytes(bytes)
            })
            .collect();
        let filter = PathFilter::new(&many);
        let outcomes: Vec<Taken> = (0..100)
            .map(|number| sets.take(&PeerId::instance(&number.to_string()), told(0, &[], filter.clone())))
            .collect();
        let kept = outcomes.iter().take_while(|taken| **taken == Taken::Kept).count();
        assert!((50..64).contains(&kept), "{kept}");
        assert!(outcomes[kept..].iter().all(|taken| *taken == Taken::Full));
        assert!(!sets.denies(&PeerId::instance("99"), &hash(9)));
    }
}
