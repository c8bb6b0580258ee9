//! Answers from the local store, with our signatures added.

use std::sync::Arc;

use bytes::Bytes;

use super::ResolveError;
use crate::nix::StorePathHash;
use crate::nix::cache_url::NarUrl;
use crate::nix::narinfo::{NarFile, NarInfo, NarInfoError, PathInfo};
use crate::signing::Signer;
use crate::store::{KnownPath, NarStream, Store, StoreError};

/// The local store and the keys that sign its paths.
#[derive(Clone, Debug)]
pub(super) struct Local {
    store: Store,
    signer: Arc<Signer>,
}

/// A NAR of the local store.
#[derive(Debug)]
pub struct LocalNar {
    store: Store,
    known: Arc<KnownPath>,
}

impl Local {
    pub(super) fn new(store: Store, signer: Arc<Signer>) -> Self {
        Self { store, signer }
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn signer(&self) -> &Signer {
        &self.signer
    }

    pub(super) async fn path(&self, hash: &StorePathHash) -> Result<Option<Arc<KnownPath>>, StoreError> {
        self.store.path(hash).await
    }

    pub(super) fn narinfo_at_once(&self, hash: &StorePathHash) -> Option<Bytes> {
        self.signed(&*self.store.remembered(hash)?).ok()
    }

    /// A NAR, if the path is here and still has that NarHash.
    pub(super) async fn nar(&self, url: &NarUrl) -> Result<Option<LocalNar>, StoreError> {
        let Some(known) = self.store.path(&url.hash).await? else { return Ok(None) };
        if url.nar_hash.is_some_and(|nar_hash| nar_hash != known.info.nar_hash) {
            return Ok(None);
        }
        Ok(Some(LocalNar { store: self.store.clone(), known }))
    }

    pub(super) async fn listing(&self, hash: &StorePathHash) -> Result<Option<Bytes>, StoreError> {
        let Some(known) = self.store.path(hash).await? else { return Ok(None) };
        Ok(self.store.listing(&known).await?.map(Bytes::from))
    }

    /// The narinfo of a path: stored signatures first, then ours. Made once a path.
    pub(super) fn signed(&self, known: &KnownPath) -> Result<Bytes, NarInfoError> {
        known.derived(|info| self.sign(info).map(Bytes::from))
    }

    fn sign(&self, info: &PathInfo) -> Result<Vec<u8>, NarInfoError> {
        let mut info = info.clone();
        self.add_signatures(&mut info)?;
        let file = NarFile::plain(&info);
        NarInfo { info, file, extensions: Vec::new() }.to_text(self.store.store_dir())
    }

    /// Our signatures behind those that are there.
    pub(super) fn add_signatures(&self, info: &mut PathInfo) -> Result<(), NarInfoError> {
        for ours in self.signer.sign(&info.fingerprint(self.store.store_dir())?) {
            // Ours may be there already: a path that came back to the host that signed it.
            if !info.signatures.contains(&ours) {
                info.signatures.push(ours);
            }
        }
        Ok(())
    }
}

impl LocalNar {
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
