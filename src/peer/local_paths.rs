//! What this host has, as the answers to other hosts' questions need it: handed in from above, since peers know nothing of
//! stores.

use std::pin::Pin;
use std::sync::Arc;

use crate::nix::{NarHash, StorePathHash};

/// What the answer to a question of another host is found by: a function, so that this layer needs no store.
#[derive(Clone)]
pub struct LocalPaths(Arc<FindFn>);

type FindFn =
    dyn Fn(StorePathHash) -> Pin<Box<dyn Future<Output = Option<Option<NarHash>>> + Send>> + Send + Sync;

impl LocalPaths {
    /// `find` gives the NarHash of a path that is held, `Some(None)` for one that is not, and `None` if it can't tell.
    pub fn new<F, R>(find: F) -> Self
    where
        F: Fn(StorePathHash) -> R + Send + Sync + 'static,
        R: Future<Output = Option<Option<NarHash>>> + Send + 'static,
    {
        Self(Arc::new(move |hash| Box::pin(find(hash))))
    }

    pub(super) async fn nar_hash(&self, hash: StorePathHash) -> Option<Option<NarHash>> {
        (self.0)(hash).await
    }
}

impl std::fmt::Debug for LocalPaths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LocalPaths")
    }
}
