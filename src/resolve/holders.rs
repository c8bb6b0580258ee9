//! Who has a NAR: the peer that served its narinfo, or whoever has it now.

use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt as _};
use moka::sync::Cache;

use super::choice::less_busy;
use super::lookup::Lookup;
use super::sought::{Found, Sought};
use crate::cache::{Origin, PeerCache, Served};
use crate::nix::cache_url::NarUrl;
use crate::peer::{PeerId, Peers};

/// How many are asked whether they have a NAR too.
const ASKED: usize = 8;
/// How many are suspected at most, and for how long.
const SUSPECTS: u64 = 1024;
const SUSPECTED: Duration = Duration::from_secs(600);

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
    suspects: Cache<PeerId, Instant>,
}

impl Holders {
    pub(super) fn new(peers: Peers, cache: PeerCache, lookup: Lookup) -> Self {
        let suspects = Cache::builder().max_capacity(SUSPECTS).time_to_live(SUSPECTED).build();
        Self { peers, cache, lookup, suspects }
    }

    /// A peer that is remembered for it and is there, but for those that were tried.
    pub(super) fn remembered(&self, url: &NarUrl, tried: &[PeerId]) -> Option<Holder> {
        let now = Instant::now();
        let fits = |served: &Served| url.nar_hash.is_none_or(|wanted| wanted == served.nar_hash);
        let there = self.cache.all(&url.hash).into_iter().filter(fits).filter_map(|served| {
            let Origin::Peer(id) = &served.origin else { return None };
            // A peer that is away is still remembered; it is asked again when it is back.
            let peer = self.peers.get(id).filter(|peer| !tried.contains(id) && !peer.is_paused(now))?;
            Some((peer, Holder { peer: id.clone(), served }))
        });
        less_busy(there.collect())
    }

    /// NarSize as it was told last, by a peer that is away by now perhaps.
    pub(super) fn told_size(&self, url: &NarUrl) -> Option<u64> {
        let served = self.cache.get(&url.hash)?;
        url.nar_hash.is_none_or(|wanted| wanted == served.nar_hash).then_some(served.nar_size)
    }

    /// The peer that is remembered, or whoever has it now, but for those that were tried. May be dropped midway.
    pub(super) async fn find(&self, url: &NarUrl, tried: &[PeerId]) -> Option<Holder> {
        let remembered = self.remembered(url, tried);
        if remembered.is_some() {
            return remembered;
        }
        let sought = Sought { hash: url.hash, nar_hash: url.nar_hash, without: tried.to_vec() };
        // Not what is remembered by now: somebody else may have corrected that meanwhile.
        let found = self.lookup.find(sought).await?;
        Some(Holder { peer: found.peer, served: found.served })
    }

    /// Who else has it, and says that it is as long, as they answer. `None`: there is nobody to ask.
    pub(super) fn others(
        &self,
        url: &NarUrl,
        nar_size: u64,
        without: Vec<PeerId>,
    ) -> Option<impl Stream<Item = Holder> + Send + use<>> {
        let sought = Sought { hash: url.hash, nar_hash: url.nar_hash, without };
        let holders = self.clone();
        Some(self.lookup.others(sought, ASKED)?.filter_map(move |Found { peer, served, .. }| {
            let fits = served.nar_size == nar_size && !holders.is_suspect(&peer);
            std::future::ready(fits.then_some(Holder { peer, served }))
        }))
    }

    /// It took part in what proved wrong, together with others. True: it was a suspect before the download of this began.
    pub(super) fn suspect(&self, peer: &PeerId, began: Instant) -> bool {
        let entry = self.suspects.entry(peer.clone()).or_insert_with(Instant::now);
        !entry.is_fresh() && *entry.value() < began
    }

    /// Whether it may be the one who sent wrong bytes: it is asked for whole NARs alone, which show who it is.
    pub(super) fn is_suspect(&self, peer: &PeerId) -> bool {
        self.suspects.contains_key(peer)
    }

    /// What it sent has proven right or wrong.
    pub(super) fn is_known(&self, peer: &PeerId) {
        self.suspects.invalidate(peer);
    }

    /// The peer that is remembered for it proved wrong.
    pub(super) fn forget(&self, url: &NarUrl, peer: &PeerId) {
        self.lookup.forget(&url.hash, peer);
    }
}
