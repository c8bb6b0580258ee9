//! What of a peer's narinfo is believed: what is right on its face, what a trusted key has signed, and what can be relayed.
//!
//! Asks nobody. The one invariant: what is found is the path that was sought, proven or left to the client to prove.

use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::sync::Cache;
use nix_narinfo::Compression;

use super::sought::{Found, Sought};
use crate::cache::{Origin, Served};
use crate::metrics::LookupMetrics;
use crate::nix::cache_url::rebuilt_nar_path;
use crate::nix::narinfo::NarInfo;
use crate::nix::{Signature, StoreDir, StorePathHash};
use crate::peer::{Peer, PeerId};
use crate::trust::Trust;

/// Signatures of one narinfo: each that may be a trusted key's takes time to check.
const MAX_SIGNATURES: usize = 64;
/// Names of keys that are told of what nobody trusted has signed, and the characters of each.
const NAMES_TOLD: usize = 8;
const NAME_LENGTH: usize = 64;
/// After how long it is said once more of a peer that its paths are not passed on.
const SAID_AGAIN: Duration = Duration::from_secs(300);

/// Whom this host believes, and what it said of whom it does not.
#[derive(Debug)]
pub(super) struct Beliefs {
    trust: Trust,
    store_dir: StoreDir,
    metrics: LookupMetrics,
    /// Peers of which it was said that their paths are not passed on.
    untrusted: Cache<PeerId, ()>,
}

impl Beliefs {
    pub(super) fn new(trust: Trust, store_dir: StoreDir, metrics: LookupMetrics) -> Self {
        let untrusted = Cache::builder().max_capacity(1024).time_to_live(SAID_AGAIN).build();
        Self { trust, store_dir, metrics, untrusted }
    }

    /// Reads what a peer gave as the narinfo of a path; or what is wrong with it on its face.
    pub(super) fn read(&self, text: &[u8], hash: &StorePathHash) -> Result<NarInfo, String> {
        let narinfo = NarInfo::parse(text, &self.store_dir)
            .map_err(|error| format!("a narinfo that is none: {error}"))?;
        if narinfo.info.signatures.len() > MAX_SIGNATURES {
            return Err(format!("a narinfo with {} signatures", narinfo.info.signatures.len()));
        }
        if narinfo.info.hash() == *hash { Ok(narinfo) } else { Err("the narinfo of another path".to_owned()) }
    }

    /// Checks what a peer said.
    pub(super) fn believe(&self, peer: &Peer, sought: &Sought, narinfo: NarInfo) -> Option<Found> {
        let hash = &sought.hash;
        if sought.nar_hash.is_some_and(|wanted| wanted != narinfo.info.nar_hash) {
            // Built there with another outcome: no lie, and not what is looked for.
            return None;
        }
        if is_packed(peer, &narinfo) {
            return None;
        }
        let signed_by = key_names(&narinfo);
        match self.trust.verify(narinfo) {
            Ok(narinfo) => {
                let served = served(peer, narinfo.narinfo())?;
                Some(Found { peer: peer.id.clone(), narinfo: Arc::new(narinfo), served })
            }
            Err(error) => {
                // A path that was built there and whose key is not trusted here is no lie.
                self.metrics.untrusted.inc();
                // It may have thousands of such paths: the first says what to do.
                if self.untrusted.entry(peer.id.clone()).or_insert(()).is_fresh() {
                    tracing::info!(peer.url, signed_by, store_path.hash = %hash, %error, "a peer's path is not passed on");
                } else {
                    tracing::debug!(peer.id = %peer.id, store_path.hash = %hash, %error, "another path is not passed on");
                }
                None
            }
        }
    }
}

/// What is remembered of a peer's answer. `None`: its NAR can't be relayed.
pub(super) fn served(peer: &Peer, narinfo: &NarInfo) -> Option<Served> {
    if is_packed(peer, narinfo) {
        return None;
    }
    let (nar_hash, nar_size) = (narinfo.info.nar_hash, narinfo.info.nar_size);
    let Some(nar_path) = rebuilt_nar_path(&narinfo.file.url, &narinfo.info.hash(), &nar_hash) else {
        tracing::debug!(peer.id = %peer.id, "a peer names a NAR in a way that is not known");
        return None;
    };
    let (origin, told) = (Origin::Peer(peer.id.clone()), Some(Instant::now()));
    Some(Served { origin, nar_hash, nar_size, nar_path, told })
}

fn is_packed(peer: &Peer, narinfo: &NarInfo) -> bool {
    let is_packed = narinfo.file.compression != Compression::None;
    if is_packed {
        tracing::debug!(peer.id = %peer.id, "a peer has the path packed, which is not relayed");
    }
    is_packed
}

/// By whom it says to be signed.
fn key_names(narinfo: &NarInfo) -> String {
    let signatures = narinfo.info.signatures.iter().take(NAMES_TOLD);
    let name = |signature: &Signature| signature.key_name.chars().take(NAME_LENGTH).collect::<String>();
    signatures.map(name).collect::<Vec<_>>().join(" ")
}
