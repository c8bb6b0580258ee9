//! What a client will ask for next: Nix asks for the narinfos of all it wants first, and then fetches one NAR after the other,
//! each after those it refers to.
//!
//! Pure but for its lock. A guess: a wrong one costs a small download that nobody reads, within the memory that spools may take.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use crate::nix::StorePathHash;

/// Paths that are remembered; with more, all are forgotten: no client fetches so many small ones in a row without others.
const MAX_TOLD: usize = 16 * 1024;
/// Downloads that are begun for each one that is asked for.
const STEP: usize = 2;

/// What was told, and in which order it may be fetched. Cheap to clone: all clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct Ahead(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    /// Paths whose narinfo was given out and whose NAR was neither asked for nor prepared, and how many of those they refer
    /// to are the same.
    waiting: HashMap<StorePathHash, usize>,
    /// Who refers to a path, as far as it was told.
    referrers: HashMap<StorePathHash, Vec<StorePathHash>>,
    /// Those that wait for no other, in the order in which Nix takes them.
    ready: BTreeMap<String, StorePathHash>,
}

impl Ahead {
    /// A client got the narinfo of a path with these references.
    pub(super) fn told(&self, hash: StorePathHash, references: impl Iterator<Item = StorePathHash>) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.waiting.len() >= MAX_TOLD || table.referrers.len() >= 4 * MAX_TOLD {
            *table = Table::default();
        }
        if table.waiting.contains_key(&hash) {
            return;
        }
        let mut waits_for = 0;
        for reference in references.filter(|reference| *reference != hash) {
            waits_for += usize::from(table.waiting.contains_key(&reference));
            let referrers = table.referrers.entry(reference).or_default();
            if !referrers.contains(&hash) {
                referrers.push(hash);
            }
        }
        table.waiting.insert(hash, waits_for);
        if waits_for == 0 {
            table.ready.insert(hash.to_string(), hash);
        }
        // Whoever refers to it was told before it, as a rule.
        for referrer in table.referrers.get(&hash).cloned().unwrap_or_default() {
            if let Some(waits_for) = table.waiting.get_mut(&referrer) {
                *waits_for += 1;
                table.ready.remove(&referrer.to_string());
            }
        }
    }

    /// A client asks for the NAR of a path. Returns what to prepare meanwhile.
    pub(super) fn asked(&self, hash: &StorePathHash) -> Vec<StorePathHash> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.take(hash);
        let mut next = Vec::new();
        while next.len() < STEP {
            // The one after it in Nix's order, or the first of all.
            let after =
                table.ready.range(hash.to_string()..).next().or_else(|| table.ready.first_key_value());
            let Some(found) = after.map(|(_, found)| *found) else { break };
            table.take(&found);
            next.push(found);
        }
        next
    }
}

impl Table {
    /// It waits no more, and nobody waits for it.
    fn take(&mut self, hash: &StorePathHash) {
        if self.waiting.remove(hash).is_none() {
            return;
        }
        self.ready.remove(&hash.to_string());
        for referrer in self.referrers.remove(hash).unwrap_or_default() {
            if let Some(waits_for) = self.waiting.get_mut(&referrer) {
                *waits_for = waits_for.saturating_sub(1);
                if *waits_for == 0 {
                    self.ready.insert(referrer.to_string(), referrer);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(letter: u8) -> StorePathHash {
        StorePathHash::parse(&[letter; 32]).unwrap()
    }

    #[test]
    fn what_refers_to_others_comes_after_them() {
        let ahead = Ahead::default();
        // From the root down, as Nix asks: c refers to b and itself, b to a.
        ahead.told(hash(b'c'), [hash(b'b'), hash(b'c')].into_iter());
        ahead.told(hash(b'b'), [hash(b'a')].into_iter());
        ahead.told(hash(b'a'), std::iter::empty());
        assert_eq!(ahead.asked(&hash(b'a')), [hash(b'b'), hash(b'c')]);
        assert!(ahead.asked(&hash(b'b')).is_empty());
    }

    #[test]
    fn what_stands_alone_comes_in_nixs_order_and_once() {
        let ahead = Ahead::default();
        for letter in b"0123" {
            ahead.told(hash(*letter), std::iter::empty());
        }
        assert_eq!(ahead.asked(&hash(b'1')), [hash(b'2'), hash(b'3')]);
        assert_eq!(ahead.asked(&hash(b'2')), [hash(b'0')]);
        assert!(ahead.asked(&hash(b'3')).is_empty());
    }

    #[test]
    fn more_than_is_remembered_is_forgotten_and_not_kept() {
        let ahead = Ahead::default();
        for number in 0..3 * MAX_TOLD {
            let text = format!("{number:0>32}");
            ahead.told(StorePathHash::parse(text.as_bytes()).unwrap(), std::iter::empty());
        }
        assert!(ahead.0.lock().unwrap().waiting.len() <= MAX_TOLD);
    }
}
