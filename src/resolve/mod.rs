//! The decision who answers a request: the local store, or a peer.
//!
//! Where `store`, `peer`, `cache` and `trust` meet. Knows what a narinfo says, and nothing of requests and statuses. The
//! invariants: what comes from a peer is passed on only when it is trusted, and a request that is to be answered from local
//! content ([`Scope::LocalOnly`]) never leaves the host.

mod ahead;
mod beliefs;
mod choice;
mod download;
mod download_error;
mod fetch;
mod holders;
mod local;
mod lookup;
mod options;
mod pace;
mod pieces;
mod relay;
mod several;
mod share;
mod sought;
mod verified;

use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::broadcast::error::RecvError;

pub use crate::cache::SpoolError;
pub use crate::peer::{INSTANCE_HEADER, LINK_HEADER, PEER_HEADER, Peer, Peers, Source};
pub use crate::store::{FileSpan, NarReadError, NarStream, StoreState};
pub use local::LocalNar;
pub use options::Options;
pub use relay::RelayedNar;
pub use share::{Holdings, Share, ShareOptions};

use self::ahead::Ahead;
use self::beliefs::Beliefs;
use self::holders::Holders;
use self::local::Local;
use self::lookup::Lookup;
use self::relay::Relays;
use self::sought::Sought;
use crate::cache::{self, Misses, Origin, PeerCache, Served, Spools};
use crate::metrics::{LookupMetrics, RelayMetrics};
use crate::nix::cache_url::NarUrl;
use crate::nix::narinfo::{FileForm, NarFile, NarInfo, NarInfoError};
use crate::nix::{StorePath, StorePathHash};
use crate::peer::News;
use crate::signing::Signer;
use crate::store::{KnownPath, Store, StoreError};
use crate::trust::{Trust, TrustedNarInfo};

/// Who may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The local store alone: the request comes from a peer, or from somebody whom we do not relay for.
    LocalOnly,
    /// The local store, and then the peers.
    LocalThenPeers,
}

/// Why there is no answer. "Not here" is none of these: that is `Ok(None)`.
#[derive(Debug, Error)]
pub enum ResolveError {
    /// The local store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What the store knows can't be put into a narinfo.
    #[error("no narinfo can be written: {0}")]
    NarInfo(#[from] NarInfoError),
}

impl ResolveError {
    /// Whether the log says it already, where it began.
    #[must_use]
    pub fn is_known(&self) -> bool {
        matches!(self, Self::Store(StoreError::Unavailable(_) | StoreError::Busy(_) | StoreError::Closed))
    }
}

/// A NAR that can be read.
pub enum Nar {
    /// From the local store.
    Local(LocalNar),
    /// From a peer.
    Relayed(Box<RelayedNar>),
}

/// Finds who can answer, and answers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Resolver {
    local: Local,
    peers: Peers,
    cache: PeerCache,
    misses: Misses,
    trust: Trust,
    lookup: Lookup,
    relays: Relays,
    share: Share,
    metrics: LookupMetrics,
}

/// What a resolver is made of.
#[derive(Debug)]
pub struct Parts {
    /// The local store.
    pub store: Store,
    /// The keys that it signs with.
    pub signer: Arc<Signer>,
    /// Whom it asks.
    pub peers: Peers,
    /// Whom it believes.
    pub trust: Trust,
    /// What peers are told of the store.
    pub share: Share,
    /// Where NARs of peers are put on their way.
    pub spools: Spools,
    /// What lookups count.
    pub metrics: LookupMetrics,
    /// What relaying counts.
    pub relay_metrics: RelayMetrics,
}

impl Resolver {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: Parts, options: &Options, remembered: &cache::Options) -> Self {
        let Parts { store, signer, peers, trust, share, spools, metrics, relay_metrics } = parts;
        let (cache, misses) = (PeerCache::new(remembered), Misses::new(remembered));
        let lookup = Lookup::new(lookup::Parts {
            peers: peers.clone(),
            misses: misses.clone(),
            cache: cache.clone(),
            beliefs: Beliefs::new(trust.clone(), store.store_dir().clone(), metrics.clone()),
            budget: options.narinfo_budget,
            metrics: metrics.clone(),
        });
        let relays = Relays {
            holders: Holders::new(peers.clone(), cache.clone(), lookup.clone()),
            spools,
            buffers: store.buffers().clone(),
            ahead: Ahead::default(),
            verify_first: options.verify_first.as_u64(),
            stall: options.stall,
            metrics: relay_metrics,
        };
        let local = Local::new(store, signer);
        Self { local, peers, cache, misses, trust, lookup, relays, share, metrics }
    }

    /// The store that it answers from.
    #[must_use]
    pub fn store(&self) -> &Store {
        self.local.store()
    }

    /// The keys that it signs with.
    #[must_use]
    pub fn signer(&self) -> &Signer {
        self.local.signer()
    }

    /// Whom it asks.
    #[must_use]
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Whom it believes.
    #[must_use]
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// How many misses are remembered, about.
    #[must_use]
    pub fn remembered_misses(&self) -> u64 {
        self.misses.len()
    }

    /// The text of a narinfo of the local store, or that nobody has it (`Some(None)`), if that is known without waiting.
    #[must_use]
    pub fn narinfo_at_once(
        &self,
        hash: &StorePathHash,
        scope: Scope,
        form: FileForm,
    ) -> Option<Option<Bytes>> {
        if let Some(text) = self.local.narinfo_at_once(hash) {
            return Some(Some(in_form(form, text)));
        }
        let nobody_has_it =
            self.store().lacks(hash) && (scope == Scope::LocalOnly || self.lookup.is_missing(hash));
        nobody_has_it.then_some(None)
    }

    /// The text of a narinfo: the signatures that came with the path first, then ours. Of a path that a peer has the file is a plain
    /// one in any form: it comes from elsewhere already, and is packed there where that helps.
    pub async fn narinfo(
        &self,
        hash: &StorePathHash,
        scope: Scope,
        form: FileForm,
    ) -> Result<Option<Bytes>, ResolveError> {
        let local = self.local.path(hash).await;
        if let Ok(Some(known)) = &local {
            self.remember_local(hash, known);
            return Ok(Some(in_form(form, self.local.signed(known)?)));
        }
        if scope == Scope::LocalOnly {
            return local.map(|_| None).map_err(ResolveError::from);
        }
        // A store that can't be asked is no reason not to ask others.
        let found = self.lookup.find(Sought::path(*hash)).await;
        self.metrics.remembered_misses.set(i64::try_from(self.misses.len()).unwrap_or(i64::MAX));
        match found {
            Some(found) => {
                tracing::debug!(store_path.hash = %hash, peer.id = %found.peer, "a peer has it");
                self.relays.told(&found.narinfo.narinfo().info);
                Ok(Some(self.passed_on(&found.narinfo)?))
            }
            None => local.map(|_| None).map_err(ResolveError::from),
        }
    }

    /// A NAR, from the local store if that has it with this NarHash, else from a peer.
    pub async fn nar(&self, url: &NarUrl, scope: Scope) -> Result<Option<Nar>, ResolveError> {
        let local = self.local.nar(url).await;
        if let Ok(Some(nar)) = local {
            return Ok(Some(Nar::Local(nar)));
        }
        match self.nar_elsewhere(url, scope).await {
            Some(nar) => Ok(Some(Nar::Relayed(Box::new(nar)))),
            None => local.map(|_| None).map_err(ResolveError::from),
        }
    }

    /// A NAR from a peer: the local store does not have it any more, or not whole.
    pub async fn nar_elsewhere(&self, url: &NarUrl, scope: Scope) -> Option<RelayedNar> {
        self.cache.forget(&url.hash, &Origin::Localhost);
        if scope == Scope::LocalOnly {
            return None;
        }
        self.relays.nar(url).await
    }

    /// The listing of a path of the local store, unless it has names that JSON can't say.
    pub async fn listing(&self, hash: &StorePathHash) -> Result<Option<Bytes>, ResolveError> {
        Ok(self.local.listing(hash).await?)
    }

    /// What is held here, or what came after the version that the asker knows, which is waited for. `None`: it is not told.
    pub async fn holdings(&self, known: Option<&str>) -> Option<Holdings> {
        self.share.tell(known).await
    }

    /// The build log of a derivation, from the local store.
    pub async fn log(&self, derivation: &StorePath) -> Result<Option<Bytes>, ResolveError> {
        Ok(self.store().log(derivation).await?.map(Bytes::from))
    }

    /// Follows what the peers tell, so that a remembered miss does not hide what has come since. Ends when dropped.
    pub async fn follow_news(self) {
        let mut news = self.peers.news();
        loop {
            match news.recv().await {
                Ok(News::Gained(hashes)) if !hashes.is_empty() => {
                    hashes.iter().for_each(|hash| self.misses.gained(hash));
                }
                // Too much at once to know what it was: then nothing remembered is believed.
                Ok(News::Came | News::Gained(_)) | Err(RecvError::Lagged(_)) => self.misses.flush(),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Lets go the downloads that nobody asks for any more. Ends when dropped.
    pub async fn sweep(self) {
        self.relays.sweep().await;
    }

    fn remember_local(&self, hash: &StorePathHash, known: &KnownPath) {
        let (nar_hash, nar_size) = (known.info.nar_hash, known.info.nar_size);
        let (origin, nar_path) = (Origin::Localhost, String::new());
        self.cache.remember(*hash, Served { origin, nar_hash, nar_size, nar_path, told: None });
    }

    /// A peer's narinfo as we pass it on: our URL in the place of the peer's, and our signature where it may stand.
    fn passed_on(&self, trusted: &TrustedNarInfo) -> Result<Bytes, NarInfoError> {
        let NarInfo { mut info, extensions, .. } = trusted.narinfo().clone();
        if self.trust.resigns() && trusted.may_be_signed() {
            self.local.add_signatures(&mut info)?;
        }
        let file = NarFile::plain(&info);
        let text = NarInfo { info, file, extensions }.to_text(self.store().store_dir())?;
        Ok(Bytes::from(text))
    }
}

/// What is kept is the plain form; another is made for each who asks, since it costs no more than copying it.
fn in_form(form: FileForm, plain: Bytes) -> Bytes {
    if form == FileForm::Plain { plain } else { form.of(&plain).into() }
}
