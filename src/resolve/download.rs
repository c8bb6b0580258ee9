//! The download of one NAR from whoever has it, into a spool, verified on its way.
//!
//! Knows nothing of who reads it. The invariants: the last bytes are given out only after length and hash have proven right, and
//! of a NAR that is verified first none before; a peer that dies, stalls, drips or turns out wrong is replaced by the next one at the same offset.

use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::time::sleep;

use super::holders::{Holder, Holders};
use super::pace::Pace;
use super::verified::Verified;
use crate::cache::{Deserted, Served, SpoolWriter};
use crate::metrics::RelayMetrics;
use crate::nix::NarHash;
use crate::nix::cache_url::NarUrl;
use crate::peer::{FetchError, PeerId};

/// How many peers are tried for one NAR before it is given up.
const TRIES: usize = 4;
/// How long after a search in vain the next one begins.
const ASKED_AGAIN: Duration = Duration::from_millis(200);
/// Who said so long ago that it has a path may honestly have collected it since.
const FRESH: Duration = Duration::from_secs(60);

/// Why a NAR did not come.
#[derive(Debug, Error)]
pub(super) enum DownloadError {
    /// A peer could not be asked, or broke off.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It had the narinfo, and not the NAR.
    #[error("the peer has the narinfo and not the NAR")]
    NotThere,
    /// A content address proves no NarSize: who tells another one may well be right, and has nothing to do with this download.
    #[error("the peer tells another NarSize")]
    OtherSize,
    /// More or fewer bytes than NarSize.
    #[error("the peer sent {got} bytes of a NAR of {expected}")]
    Length {
        /// How many came.
        got: u64,
        /// NarSize.
        expected: u64,
    },
    /// Other bytes than those that were signed.
    #[error("the peer sent other bytes than those of NarHash")]
    Hash,
    /// Another peer sends other bytes than those that were given out already: too late to mend.
    #[error("a peer sent other bytes than those of NarHash, and its first ones were given out")]
    GivenOut,
    /// Nobody listens any more.
    #[error(transparent)]
    Deserted(#[from] Deserted),
    /// The daemon shuts down.
    #[error("the daemon stops")]
    Stopped,
}

/// A NAR on its way.
pub(super) struct Download {
    holders: Holders,
    metrics: RelayMetrics,
    stall: Duration,
    /// With its NarHash: only this NAR will do.
    url: NarUrl,
    verified: Verified,
    /// Who sent the bytes that came.
    senders: Vec<PeerId>,
    /// When the latest wait for a peer began.
    waits_since: Instant,
}

impl Download {
    pub(super) fn new(
        holders: Holders,
        url: NarUrl,
        nar_hash: NarHash,
        stall: Duration,
        whole: bool,
        writer: SpoolWriter,
        metrics: RelayMetrics,
    ) -> Self {
        Self {
            holders,
            metrics,
            stall,
            url,
            verified: Verified::new(nar_hash, whole, writer),
            senders: Vec::new(),
            waits_since: Instant::now(),
        }
    }

    /// Downloads, from `first` and from others if that fails.
    pub(super) async fn run(mut self, first: Holder) {
        let (mut tried, mut wrong) = (Vec::new(), Vec::new());
        let mut holder = Some(first);
        let mut last_error = None;
        while let Some(Holder { peer, served }) = holder {
            match self.from(&peer, &served).await {
                Ok(()) => return self.verified.finish(),
                Err(DownloadError::Deserted(_) | DownloadError::Stopped) => return,
                Err(error @ DownloadError::GivenOut) => return self.verified.fail(error),
                Err(error) => {
                    self.blame(&peer, &served, &error);
                    if matches!(error, DownloadError::Hash) {
                        self.verified.begin_anew();
                        self.senders.clear();
                    }
                    if !matches!(error, DownloadError::Fetch(_)) {
                        wrong.push(peer.clone());
                    }
                    last_error = Some(error);
                }
            }
            self.holders.forget(&self.url, &peer);
            tried.push(peer);
            if tried.len() >= TRIES {
                break;
            }
            holder = self.another(&tried, &wrong).await;
            if holder.is_some() {
                self.metrics.failovers.inc();
            }
        }
        let why = last_error.map_or_else(|| "no peer has it".to_owned(), |error| error.to_string());
        self.verified.fail(why);
    }

    /// Who goes on. Before the first byte a client that is told soon asks elsewhere; midway it would have to begin anew, so that
    /// it is worth waiting for one that was too slow to say so, or that comes back.
    async fn another(&self, tried: &[PeerId], wrong: &[PeerId]) -> Option<Holder> {
        let began = Instant::now();
        let mut without = tried;
        loop {
            if let Some(holder) = self.holders.find(&self.url, without).await {
                return Some(holder);
            }
            if !self.verified.is_begun() || began.elapsed() >= self.stall {
                return None;
            }
            sleep(ASKED_AGAIN).await;
            without = wrong;
        }
    }

    /// Goes on with this peer where the one before has ended.
    async fn from(&mut self, peer: &PeerId, served: &Served) -> Result<(), DownloadError> {
        if served.nar_size != self.verified.nar_size() {
            return Err(DownloadError::OtherSize);
        }
        let before = self.verified.got();
        let known = self.holders.peers.get(peer).ok_or(DownloadError::NotThere)?;
        let _in_flight = self.holders.peers.began(peer);
        let mut pace = Pace::new(self.stall, known.in_flight);
        self.waits_since = Instant::now();
        let arriving = self
            .holders
            .peers
            .client(&known)?
            .file(&served.nar_path, self.verified.got(), self.stall)
            .await?;
        pace.all_waits += self.waits_since.elapsed();
        let mut arriving = arriving.ok_or(DownloadError::NotThere)?;
        let announced = arriving.remaining().map(|left| arriving.offset.saturating_add(left));
        if let Some(got) = announced.filter(|announced| *announced != self.verified.nar_size()) {
            return Err(DownloadError::Length { got, expected: self.verified.nar_size() });
        }
        let mut skip = self.verified.got() - arriving.offset;
        let mut is_sender = false;
        while self.verified.got() < self.verified.nar_size() {
            self.verified.room().await?;
            self.waits_since = Instant::now();
            let Some(mut chunk) = pace.next(&mut arriving).await? else {
                return Err(DownloadError::Length {
                    got: self.verified.got(),
                    expected: self.verified.nar_size(),
                });
            };
            // What came before from another peer: the hash of the whole proves in the end that it was the same.
            let passed = skip.min(chunk.len() as u64);
            skip -= passed;
            let chunk = chunk.split_off(usize::try_from(passed).unwrap_or(usize::MAX));
            if chunk.is_empty() {
                continue;
            }
            if !std::mem::replace(&mut is_sender, true) {
                self.senders.push(peer.clone());
            }
            self.verified.take(chunk).await?;
        }
        self.verified.prove().await?;
        self.holders.peers.delivered(peer, self.verified.got() - before, pace.all_waits);
        Ok(())
    }

    fn blame(&self, peer: &PeerId, served: &Served, error: &DownloadError) {
        // A download takes long: what failed elsewhere since its beginning says nothing of its latest wait.
        let after = self.waits_since.elapsed();
        match error {
            DownloadError::Fetch(error) => self.holders.peers.did_not_deliver(peer, error, after),
            DownloadError::NotThere if served.told.is_some_and(|told| told.elapsed() < FRESH) => {
                self.holders.peers.did_not_deliver(peer, &FetchError::Status(404), after);
            }
            DownloadError::Length { .. } => self.holders.peers.lied(peer, &error.to_string()),
            // Of several nobody knows whose bytes were wrong: all are passed over for a while.
            DownloadError::Hash => {
                self.senders.iter().for_each(|sender| self.holders.peers.lied(sender, &error.to_string()));
            }
            DownloadError::NotThere
            | DownloadError::OtherSize
            | DownloadError::GivenOut
            | DownloadError::Deserted(_)
            | DownloadError::Stopped => {}
        }
        tracing::debug!(peer.id = %peer, %error, got_bytes = self.verified.got(), "a NAR does not come from this peer");
    }
}
