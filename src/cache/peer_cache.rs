//! The peer cache: which peer, or localhost, served the narinfo of a path.
//!
//! A hint, never a promise: whoever reads it asks the peer named, and corrects it when that proves wrong.

use std::time::Instant;

use moka::sync::Cache;

use super::Options;
use crate::nix::{NarHash, StorePathHash};
use crate::peer::PeerId;

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
pub struct PeerCache(Cache<StorePathHash, Served>);

impl PeerCache {
    /// An empty cache within the bounds of these options.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        Self(Cache::builder().max_capacity(options.entries).time_to_live(options.positive_ttl).build())
    }

    /// Who served it last, if that is remembered.
    #[must_use]
    pub fn get(&self, hash: &StorePathHash) -> Option<Served> {
        self.0.get(hash)
    }

    /// Remembers who served it.
    pub fn remember(&self, hash: StorePathHash, served: Served) {
        // Local hits come by the thousand, and say the same each time.
        if self.0.get(&hash).as_ref() != Some(&served) {
            self.0.insert(hash, served);
        }
    }

    /// Forgets an entry that proved wrong, unless it was corrected meanwhile.
    pub fn forget(&self, hash: &StorePathHash, wrong: &Origin) {
        if self.0.get(hash).is_some_and(|served| served.origin == *wrong) {
            self.0.invalidate(hash);
        }
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
}
