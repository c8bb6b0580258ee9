//! Who has a NAR: the peer that served its narinfo, or whoever has it now.

use std::time::Instant;

use super::lookup::{Lookup, Sought};
use crate::cache::{Origin, PeerCache, Served};
use crate::nix::cache_url::NarUrl;
use crate::peer::{PeerId, Peers};

/// A peer, and what it said of the NAR.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub(super) peer: PeerId,
    pub(super) served: Served,
}

/// Finds holders. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Holders {
    pub(super) peers: Peers,
    cache: PeerCache,
    lookup: Lookup,
}

impl Holders {
    pub(super) fn new(peers: Peers, cache: PeerCache, lookup: Lookup) -> Self {
        Self { peers, cache, lookup }
    }

    /// The peer that is remembered for it, if that is there.
    pub(super) fn remembered(&self, url: &NarUrl) -> Option<Holder> {
        let served = self.cache.get(&url.hash)?;
        let Origin::Peer(peer) = &served.origin else { return None };
        let fits = url.nar_hash.is_none_or(|wanted| wanted == served.nar_hash);
        // A peer that is away is still remembered; it is asked again when it is back.
        let is_there = || self.peers.get(peer).is_some_and(|peer| !peer.is_paused(Instant::now()));
        (fits && is_there()).then(|| Holder { peer: peer.clone(), served: served.clone() })
    }

    /// NarSize as it was told last, by a peer that is away by now perhaps.
    pub(super) fn told_size(&self, url: &NarUrl) -> Option<u64> {
        let served = self.cache.get(&url.hash)?;
        url.nar_hash.is_none_or(|wanted| wanted == served.nar_hash).then_some(served.nar_size)
    }

    /// The peer that is remembered, or whoever has it now, but for those that were tried. May be dropped midway.
    pub(super) async fn find(&self, url: &NarUrl, tried: &[PeerId]) -> Option<Holder> {
        let remembered = self.remembered(url).filter(|holder| !tried.contains(&holder.peer));
        if remembered.is_some() {
            return remembered;
        }
        let sought = Sought { hash: url.hash, nar_hash: url.nar_hash, without: tried.to_vec() };
        // Not what is remembered by now: somebody else may have corrected that meanwhile.
        let found = self.lookup.find(sought).await?;
        Some(Holder { peer: found.peer, served: found.served })
    }

    /// The peer that is remembered for it proved wrong.
    pub(super) fn forget(&self, url: &NarUrl, peer: &PeerId) {
        self.lookup.forget(&url.hash, peer);
    }
}
