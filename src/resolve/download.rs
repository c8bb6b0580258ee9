//! The download of one NAR from whoever has it, into a spool, verified on its way.
//!
//! Knows nothing of who reads it. The invariants: the last bytes are given out only after length and hash have proven right, and
//! of a NAR that is verified first none before; a peer that dies, stalls, drips or turns out wrong is replaced by the next one at the same offset.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use tokio::time::sleep;

use super::download_error::DownloadError;
use super::holders::{Holder, Holders};
use super::pace::Pace;
use super::relay::Relays;
use super::several::{Ended, Others};
use super::verified::Verified;
use crate::cache::{Memory, SpoolWriter, Spools};
use crate::metrics::RelayMetrics;
use crate::nix::NarHash;
use crate::nix::cache_url::NarUrl;
use crate::peer::{Arriving, FetchError, PeerId};

/// How many peers are tried for one NAR before it is given up.
const TRIES: usize = 4;
/// How long after a search in vain the next one begins.
const ASKED_AGAIN: Duration = Duration::from_millis(200);
/// Who said so long ago that it has a path may honestly have collected it since.
const FRESH: Duration = Duration::from_secs(60);
/// What is longer, in bytes, comes from several peers at once.
const SPLIT_FROM: u64 = 32 * 1024 * 1024;
/// Memory for what comes before its turn: with less it is not worth it, and more is of no use. In bytes.
const LEAST_AHEAD: u64 = 2 * 1024 * 1024;
const MOST_AHEAD: u64 = 16 * 1024 * 1024;

/// A NAR on its way.
pub(super) struct Download {
    pub(super) holders: Holders,
    pub(super) spools: Spools,
    pub(super) metrics: RelayMetrics,
    pub(super) stall: Duration,
    /// With its NarHash: only this NAR will do.
    pub(super) url: NarUrl,
    pub(super) verified: Verified,
    /// Who sent the bytes that came.
    pub(super) senders: Vec<Holder>,
    /// What is told of peers once their bytes have proven right: how many, and how long they were waited for.
    pub(super) sent: Vec<(PeerId, u64, Duration)>,
    /// Who failed.
    pub(super) tried: Vec<PeerId>,
    /// And not only by being away.
    wrong: Vec<PeerId>,
    /// What came from several proved wrong: they are tried one by one, so that the liar is found.
    apart: Option<VecDeque<Holder>>,
    /// When the latest wait for a peer began, and when all of it did.
    waits_since: Instant,
    began: Instant,
}

impl Download {
    pub(super) fn new(
        relays: &Relays,
        url: NarUrl,
        nar_hash: NarHash,
        whole: bool,
        writer: SpoolWriter,
    ) -> Self {
        Self {
            holders: relays.holders.clone(),
            spools: relays.spools.clone(),
            metrics: relays.metrics.clone(),
            stall: relays.stall,
            url,
            verified: Verified::new(nar_hash, whole, writer, relays.buffers.clone()),
            senders: Vec::new(),
            sent: Vec::new(),
            tried: Vec::new(),
            wrong: Vec::new(),
            apart: None,
            waits_since: Instant::now(),
            began: Instant::now(),
        }
    }

    /// Downloads, from `first`, from others at the same time if it is large, and from others if that fails.
    pub(super) async fn run(mut self, first: Holder) {
        let mut holder = Some(first);
        let mut last_error = None;
        while let Some(next) = holder {
            match self.from(next).await {
                Ok(()) => {
                    self.all_proved_right();
                    return self.verified.finish();
                }
                Err(DownloadError::Deserted(_) | DownloadError::Stopped) => return,
                Err(error @ DownloadError::GivenOut) => return self.verified.fail(error),
                Err(error @ DownloadError::Hash) => {
                    self.proved_wrong(&error);
                    last_error = Some(error);
                }
                Err(error) => {
                    if self.apart.is_some() {
                        // What it sent before it broke off may be the lie: the next one shows itself from the beginning.
                        self.begin_anew();
                    }
                    last_error = Some(error);
                }
            }
            if self.tried.len() >= TRIES {
                break;
            }
            holder = match self.apart.as_mut().and_then(VecDeque::pop_front) {
                Some(suspect) => Some(suspect),
                None => self.another().await,
            };
            if holder.is_some() {
                self.metrics.failovers.inc();
            }
        }
        let why = last_error.map_or_else(|| "no peer has it".to_owned(), |error| error.to_string());
        self.verified.fail(why);
    }

    /// Who goes on. Before the first byte a client that is told soon asks elsewhere; midway it would have to begin anew, so that
    /// it is worth waiting for one that was too slow to say so, or that comes back.
    async fn another(&self) -> Option<Holder> {
        let began = Instant::now();
        let mut without = &self.tried;
        loop {
            if let Some(holder) = self.holders.find(&self.url, without).await {
                return Some(holder);
            }
            if !self.verified.is_begun() || began.elapsed() >= self.stall {
                return None;
            }
            sleep(ASKED_AGAIN).await;
            without = &self.wrong;
        }
    }

    /// Goes on with this peer, and with others if there are some and that is worth it.
    async fn from(&mut self, holder: Holder) -> Result<(), DownloadError> {
        let together = self.together(&holder);
        let (alone, begun) = match together {
            Some((others, memory)) => match self.several(holder, others, &memory).await? {
                Ended::Proven => return Ok(()),
                Ended::Alone(holder, begun) => (holder, begun),
            },
            None => (holder, None),
        };
        let result = self.alone(&alone, begun).await;
        if let Err(error) = &result {
            self.failed(&alone, error, self.waits_since.elapsed());
        }
        result
    }

    /// Goes on with this peer alone where the one before has ended; it may have begun to send already.
    async fn alone(&mut self, holder: &Holder, begun: Option<Box<Arriving>>) -> Result<(), DownloadError> {
        let Holder { peer, served } = holder;
        let (before, nar_size) = (self.verified.got(), self.verified.nar_size());
        if served.nar_size != nar_size {
            return Err(DownloadError::OtherSize);
        }
        let known = self.holders.peers.get(peer).ok_or(DownloadError::NotThere)?;
        let _in_flight = self.holders.peers.began(peer);
        let mut pace = Pace::new(self.stall, known.in_flight);
        self.waits_since = Instant::now();
        let mut arriving = match begun {
            Some(begun) => *begun,
            None => {
                let client = self.holders.peers.client(&known)?;
                let arriving = client.file(&served.nar_path, before, self.stall).await?;
                arriving.ok_or(DownloadError::NotThere)?
            }
        };
        pace.all_waits += self.waits_since.elapsed();
        let announced = arriving.remaining().map(|left| arriving.offset.saturating_add(left));
        if let Some(got) = announced.filter(|announced| *announced != nar_size) {
            return Err(DownloadError::Length { got, expected: nar_size });
        }
        let mut skip = before - arriving.offset;
        while self.verified.got() < nar_size {
            self.verified.room().await?;
            self.waits_since = Instant::now();
            let Some(mut chunk) = pace.next(&mut arriving).await? else {
                return Err(DownloadError::Length { got: self.verified.got(), expected: nar_size });
            };
            // What came before from another peer: the hash of the whole proves in the end that it was the same.
            let passed = skip.min(chunk.len() as u64);
            skip -= passed;
            let chunk = chunk.split_off(usize::try_from(passed).unwrap_or(usize::MAX));
            if chunk.is_empty() {
                continue;
            }
            self.sends(holder);
            self.verified.take(chunk).await?;
        }
        arriving.finish();
        self.verified.prove().await?;
        self.sent.push((peer.clone(), self.verified.got() - before, pace.all_waits));
        Ok(())
    }

    /// Some of the bytes are from this peer.
    pub(super) fn sends(&mut self, holder: &Holder) {
        // Most often it is the latest.
        if !self.senders.iter().rev().any(|sender| sender.peer == holder.peer) {
            self.senders.push(holder.clone());
        }
    }

    fn all_proved_right(&self) {
        for (peer, bytes, waited) in &self.sent {
            self.holders.peers.delivered(peer, *bytes, *waited);
        }
        self.senders.iter().for_each(|sender| self.holders.is_known(&sender.peer));
    }

    /// What came is not what was signed: all of it comes once more, and what was given out has to be its beginning.
    fn proved_wrong(&mut self, error: &DownloadError) {
        let senders = self.begin_anew();
        if let [liar] = &senders[..] {
            self.lied(liar, error);
            return;
        }
        // Of several nobody knows whose bytes were wrong: each shows it by itself. Who takes part in this once more before it has shown it is
        // passed over for a while.
        for sender in senders {
            if self.holders.suspect(&sender.peer, self.began) {
                self.lied(&sender, error);
            } else {
                self.apart.get_or_insert_default().push_back(sender);
            }
        }
    }

    /// All of it comes once more. Gives who had sent what is not believed.
    fn begin_anew(&mut self) -> Vec<Holder> {
        self.sent.clear();
        self.verified.begin_anew();
        std::mem::take(&mut self.senders)
    }

    fn lied(&mut self, liar: &Holder, error: &DownloadError) {
        self.holders.is_known(&liar.peer);
        self.holders.peers.lied(&liar.peer, &error.to_string());
        self.gives_up(liar, error);
    }

    /// A peer does not send the NAR, or not as it should, `after` it was waited for so long.
    pub(super) fn failed(&mut self, holder: &Holder, error: &DownloadError, after: Duration) {
        let (peers, peer) = (&self.holders.peers, &holder.peer);
        match error {
            DownloadError::Fetch(error) => peers.did_not_deliver(peer, error, after),
            DownloadError::NotThere if holder.served.told.is_some_and(|told| told.elapsed() < FRESH) => {
                peers.did_not_deliver(peer, &FetchError::Status(404), after);
            }
            DownloadError::Length { .. } => peers.lied(peer, &error.to_string()),
            DownloadError::NotThere | DownloadError::OtherSize => {}
            // Whose fault that is is not known here, or it is nobody's.
            DownloadError::Hash
            | DownloadError::GivenOut
            | DownloadError::Deserted(_)
            | DownloadError::Stopped => return,
        }
        self.gives_up(holder, error);
    }

    fn gives_up(&mut self, holder: &Holder, error: &DownloadError) {
        let peer = &holder.peer;
        tracing::debug!(peer.id = %peer, %error, got_bytes = self.verified.got(), "a NAR does not come from this peer");
        self.holders.forget(&self.url, peer);
        self.tried.push(peer.clone());
        if !matches!(error, DownloadError::Fetch(_)) {
            self.wrong.push(peer.clone());
        }
    }

    /// Who may have it besides, and memory for what comes before its turn. `None`: one peer alone gives it.
    fn together(&self, holder: &Holder) -> Option<(Others, Memory)> {
        let nar_size = self.verified.nar_size();
        let is_large = nar_size.saturating_sub(self.verified.got()) > SPLIT_FROM;
        if !is_large || self.apart.is_some() || self.holders.is_suspect(&holder.peer) {
            return None;
        }
        let without = self.tried.iter().chain([&holder.peer]).cloned().collect();
        let others = self.holders.others(&self.url, nar_size, without)?;
        Some((others.boxed(), self.spools.memory_ahead(LEAST_AHEAD, MOST_AHEAD)?))
    }
}
