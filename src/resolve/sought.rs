//! What is looked for on the LAN, and what is found.

use std::sync::Arc;

use crate::cache::Served;
use crate::nix::{NarHash, StorePathHash};
use crate::peer::PeerId;
use crate::trust::TrustedNarInfo;

/// A narinfo that was found, and the peer that had it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) peer: PeerId,
    pub(super) narinfo: Arc<TrustedNarInfo>,
    pub(super) served: Served,
}

/// What is looked for. One question at a time for each.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Sought {
    pub(super) hash: StorePathHash,
    /// Only a path with this NAR will do.
    pub(super) nar_hash: Option<NarHash>,
    /// Peers that were tried already.
    pub(super) without: Vec<PeerId>,
}

impl Sought {
    /// The path, whatever its NAR, from whomever.
    pub(super) fn path(hash: StorePathHash) -> Self {
        Self { hash, nar_hash: None, without: Vec::new() }
    }

    /// Whether a miss is one for everybody who asks for the path.
    pub(super) fn is_general(&self) -> bool {
        self.nar_hash.is_none() && self.without.is_empty()
    }
}
