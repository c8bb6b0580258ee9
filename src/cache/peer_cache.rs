//! The peer cache: which peer, or localhost, served the narinfo of a path, and who else said to have it.
//!
//! A hint, never a promise: whoever reads it asks the peer named, and corrects it when that proves wrong. What is said of one
//! path is said of one NAR: an answer that names another takes the place of all before.

use std::time::Instant;

use moka::ops::compute::Op;
use moka::sync::Cache;

use super::Options;
use crate::nix::{NarHash, StorePathHash};
use crate::peer::PeerId;

/// How many are remembered to have a path.
pub const HOLDERS: usize = 4;

/// Where an answer came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The local store.
    Localhost,
    /// This peer.
    Peer(PeerId),
}

/// Who served a narinfo, and what it said of the NAR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// Who.
    pub origin: Origin,
    /// SHA-256 of the NAR.
    pub nar_hash: NarHash,
    /// Length of the NAR in bytes.
    pub nar_size: u64,
    /// Where the NAR lies below that cache.
    pub nar_path: String,
    /// When a peer said so.
    pub told: Option<Instant>,
}

/// Who served which narinfo. Cheap to clone: all clones are one cache.
#[derive(Clone, Debug)]
pub struct PeerCache(Cache<StorePathHash, Vec<Served>>);

impl PeerCache {
    /// An empty cache within the bounds of these options.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self(Cache::builder().max_capacity(options.entries).time_to_live(options.positive_ttl).build())
    }

    /// Who served it last, if that is remembered.
    #[must_use]
    pub fn get(&self, hash: &StorePathHash) -> Option<Served> {
        self.all(hash).into_iter().next()
    }

    /// All who are remembered to have it, the last that served it first: [`HOLDERS`] at most.
    #[must_use]
    pub fn all(&self, hash: &StorePathHash) -> Vec<Served> {
        self.0.get(hash).unwrap_or_default()
    }

    /// Remembers who served it.
    pub fn remember(&self, hash: StorePathHash, served: Served) {
        // Local hits come by the thousand, and say the same each time.
        if self.0.get(&hash).is_some_and(|all| all.first() == Some(&served)) {
            return;
        }
        self.0.entry(hash).and_upsert_with(|entry| {
            let mut all = entry.map(|entry| entry.into_value()).unwrap_or_default();
            all.retain(|other| other.origin != served.origin && other.is_same_nar(&served));
            all.insert(0, served);
            all.truncate(HOLDERS);
            all
        });
    }

    /// Remembers who has it besides, if it is the same NAR.
    pub fn also(&self, hash: StorePathHash, served: Served) {
        self.0.entry(hash).and_upsert_with(|entry| {
            let mut all = entry.map(|entry| entry.into_value()).unwrap_or_default();
            let Some(first) = all.first() else { return vec![served] };
            if first.is_same_nar(&served) {
                if let Some(known) = all.iter_mut().find(|other| other.origin == served.origin) {
                    *known = served;
                } else if all.len() < HOLDERS {
                    all.push(served);
                }
            }
            all
        });
    }

    /// Forgets an entry that proved wrong, unless it was corrected meanwhile.
    pub fn forget(&self, hash: &StorePathHash, wrong: &Origin) {
        self.0.entry(*hash).and_compute_with(|entry| {
            let Some(mut all) = entry.map(|entry| entry.into_value()) else { return Op::Nop };
            all.retain(|served| served.origin != *wrong);
            if all.is_empty() { Op::Remove } else { Op::Put(all) }
        });
    }
}

impl Served {
    fn is_same_nar(&self, other: &Self) -> bool {
        (self.nar_hash, self.nar_size) == (other.nar_hash, other.nar_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_corrected_and_a_correction_is_not_forgotten() {
        let cache = PeerCache::new(&Options::default());
        let hash = StorePathHash::parse(&[b'0'; 32]).unwrap();
        let by = |origin| Served {
            origin,
            nar_hash: NarHash::from_digest([1; 32]),
            nar_size: 1,
            nar_path: String::new(),
            told: None,
        };
        let peer = Origin::Peer(PeerId::instance("a"));
        cache.remember(hash, by(Origin::Localhost));
        cache.remember(hash, by(peer.clone()));
        cache.forget(&hash, &Origin::Localhost);
        assert_eq!(cache.get(&hash), Some(by(peer.clone())));
        cache.forget(&hash, &peer);
        assert_eq!(cache.get(&hash), None);
    }

    #[test]
    fn others_that_have_it_are_remembered_behind_who_served_it_last_and_only_of_the_same_nar() {
        let (cache, hash) = (PeerCache::new(&Options::default()), StorePathHash::parse(&[b'0'; 32]).unwrap());
        let by = |id: &str, nar: u8| Served {
            origin: Origin::Peer(PeerId::instance(id)),
            nar_hash: NarHash::from_digest([nar; 32]),
            nar_size: 1,
            nar_path: String::new(),
            told: None,
        };
        cache.also(hash, by("a", 1));
        cache.also(hash, by("b", 2));
        cache.remember(hash, by("c", 1));
        for id in ["c", "a", "d", "e", "f"] {
            cache.also(hash, by(id, 1));
        }
        assert_eq!(cache.all(&hash), ["c", "a", "d", "e"].map(|id| by(id, 1)));
        cache.forget(&hash, &by("c", 1).origin);
        assert_eq!(cache.get(&hash), Some(by("a", 1)));
        cache.remember(hash, by("e", 1));
        assert_eq!(cache.all(&hash), ["e", "a", "d"].map(|id| by(id, 1)));
        cache.remember(hash, by("a", 2));
        assert_eq!(cache.all(&hash), [by("a", 2)]);
    }
}
