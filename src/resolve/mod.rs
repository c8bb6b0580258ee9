//! The decision who answers a request. So far: the local store, with our signatures added.
//!
//! Above the store and below HTTP: knows what a narinfo says, and nothing of requests and statuses.

use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

use crate::nix::cache_url::NarUrl;
use crate::nix::narinfo::{NarFile, NarInfo, NarInfoError, PathInfo};
use crate::nix::{StorePath, StorePathHash};
use crate::signing::Signer;
use crate::store::{KnownPath, Store, StoreError};
pub use crate::store::{NarReadError, NarStream, StoreState};

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

/// Finds who can answer, and answers.
#[derive(Clone, Debug)]
pub struct Resolver {
    store: Store,
    signer: Arc<Signer>,
}

/// A NAR that can be read.
#[derive(Debug)]
pub struct Nar {
    store: Store,
    known: Arc<KnownPath>,
}

impl Resolver {
    /// Answers from this store, signing with these keys.
    #[must_use]
    pub fn new(store: Store, signer: Arc<Signer>) -> Self {
        Self { store, signer }
    }

    /// The store that it answers from.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The keys that it signs with.
    #[must_use]
    pub fn signer(&self) -> &Signer {
        &self.signer
    }

    /// The text of a narinfo, if it can be had without waiting.
    pub fn narinfo_at_once(&self, hash: &StorePathHash) -> Option<Bytes> {
        self.signed(&*self.store.remembered(hash)?).ok()
    }

    /// The text of a narinfo: stored signatures first, then ours.
    pub async fn narinfo(&self, hash: &StorePathHash) -> Result<Option<Bytes>, ResolveError> {
        match self.store.path(hash).await? {
            Some(known) => Ok(Some(self.signed(&known)?)),
            None => Ok(None),
        }
    }

    /// A NAR, if the path is here and still has that NarHash.
    pub async fn nar(&self, url: &NarUrl) -> Result<Option<Nar>, ResolveError> {
        let Some(known) = self.store.path(&url.hash).await? else { return Ok(None) };
        if url.nar_hash.is_some_and(|nar_hash| nar_hash != known.info.nar_hash) {
            return Ok(None);
        }
        Ok(Some(Nar { store: self.store.clone(), known }))
    }

    /// The listing of a path, unless it has names that JSON can't say.
    pub async fn listing(&self, hash: &StorePathHash) -> Result<Option<Bytes>, ResolveError> {
        let Some(known) = self.store.path(hash).await? else { return Ok(None) };
        Ok(self.store.listing(&known).await?.map(Bytes::from))
    }

    /// The build log of a derivation.
    pub async fn log(&self, derivation: &StorePath) -> Result<Option<Bytes>, ResolveError> {
        Ok(self.store.log(derivation).await?.map(Bytes::from))
    }

    fn signed(&self, known: &KnownPath) -> Result<Bytes, NarInfoError> {
        known.derived(|info| self.sign(info).map(Bytes::from))
    }

    fn sign(&self, info: &PathInfo) -> Result<Vec<u8>, NarInfoError> {
        let store_dir = self.store.store_dir();
        let mut info = info.clone();
        for ours in self.signer.sign(&info.fingerprint(store_dir)?) {
            // Ours may be stored already: a path that came back to the host that signed it.
            if !info.signatures.contains(&ours) {
                info.signatures.push(ours);
            }
        }
        let file = NarFile::plain(&info);
        NarInfo { info, file, extensions: Vec::new() }.to_text(store_dir)
    }
}

impl Nar {
    /// The facts about the path.
    #[must_use]
    pub fn info(&self) -> &PathInfo {
        &self.known.info
    }

    /// The bytes of the NAR in `range`, which has to lie within NarSize.
    pub async fn stream(&self, range: std::ops::Range<u64>) -> Result<NarStream, ResolveError> {
        Ok(self.store.nar(&self.known, range).await?)
    }
}
