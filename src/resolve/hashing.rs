//! SHA-256 of bytes as they come, beside whatever else is done with them.
//!
//! A NAR of some size is hashed by a task of its own: receiving and sending need not wait for it, and on the way through a
//! host that is half of the time. A task and not a thread, since a slow client may keep it for long. A small NAR is not worth
//! either.

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::nix::NarHash;

/// From how many bytes on a task is worth it.
const WORTH_A_TASK: u64 = 256 * 1024;
/// Chunks that wait to be hashed.
const AHEAD: usize = 16;

/// A hash in the making.
pub(super) enum Hashing {
    Here(Sha256),
    Beside { chunks: mpsc::Sender<Bytes>, digest: JoinHandle<NarHash> },
}

impl Hashing {
    /// Begins to hash a NAR of this size.
    pub(super) fn begin(nar_size: u64) -> Self {
        if nar_size < WORTH_A_TASK {
            return Self::Here(Sha256::new());
        }
        let (chunks, mut receiver) = mpsc::channel::<Bytes>(AHEAD);
        let digest = tokio::spawn(async move {
            let mut hasher = Sha256::new();
            while let Some(chunk) = receiver.recv().await {
                hasher.update(&chunk);
            }
            NarHash::from_digest(hasher.finalize().into())
        });
        Self::Beside { chunks, digest }
    }

    /// Takes the next bytes.
    pub(super) async fn update(&mut self, chunk: &Bytes) {
        match self {
            Self::Here(hasher) => hasher.update(chunk),
            // A task that is gone leaves no digest, and that is noticed at the end.
            Self::Beside { chunks, .. } => drop(chunks.send(chunk.clone()).await),
        }
    }

    /// The hash of all that came. `None`: the runtime shuts down.
    pub(super) async fn finish(self) -> Option<NarHash> {
        match self {
            Self::Here(hasher) => Some(NarHash::from_digest(hasher.finalize().into())),
            Self::Beside { chunks, digest } => {
                drop(chunks);
                digest.await.ok()
            }
        }
    }
}
