//! The download of one NAR from whoever has it, into a spool, verified on its way.
//!
//! Knows nothing of who reads it. The invariants: the last bytes are given out only after length and hash have proven right, and
//! of a NAR that is verified first none before; a peer that dies, stalls, drips or turns out wrong is replaced by the next one at the same offset.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::holders::{Holder, Holders};
use crate::cache::{Deserted, Served, SpoolWriter};
use crate::metrics::RelayMetrics;
use crate::nix::NarHash;
use crate::nix::cache_url::NarUrl;
use crate::peer::{Arriving, FetchError, PeerId};

/// How many peers are tried for one NAR before it is given up.
const TRIES: usize = 4;
/// A peer that sends fewer bytes a second than this is as good as one that stalls.
pub(super) const LOWEST_RATE: u64 = 256 * 1024;
/// How long after a search in vain the next one begins.
const ASKED_AGAIN: Duration = Duration::from_millis(200);
/// What is not taken for a stall however many downloads share a link, in bytes a second.
const LEAST_SHARE: u64 = 8 * 1024;
/// Shorter pieces are copied and gathered until they are as long: each costs a step of the hash and of the spool, and
/// may hold on to a far larger buffer.
const COPIED: usize = 64 * 1024;
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
    nar_hash: NarHash,
    nar_size: u64,
    /// Whether nothing is given out before all of it is verified.
    whole: bool,
    writer: SpoolWriter,
    /// Of all bytes that came.
    hasher: Sha256,
    got: u64,
    /// The latest bytes, or all of them: what was not given out.
    held: Vec<Bytes>,
    /// Short pieces behind those, not hashed yet.
    tail: BytesMut,
    /// How many bytes were given out, and the digest of those: what comes from another peer has to begin with the same.
    given: u64,
    given_digest: [u8; 32],
    /// Whether what comes is compared with what was given out before it goes on.
    is_repeated: bool,
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
            nar_hash,
            nar_size: writer.total(),
            whole,
            writer,
            hasher: Sha256::new(),
            got: 0,
            held: Vec::new(),
            tail: BytesMut::new(),
            given: 0,
            given_digest: [0; 32],
            is_repeated: false,
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
                Ok(()) => return self.writer.finish(),
                Err(DownloadError::Deserted(_) | DownloadError::Stopped) => return,
                Err(error @ DownloadError::GivenOut) => return self.writer.fail(error),
                Err(error) => {
                    self.blame(&peer, &served, &error);
                    if matches!(error, DownloadError::Hash) {
                        self.begin_anew();
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
        self.writer.fail(why);
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
            if self.given == 0 || began.elapsed() >= self.stall {
                return None;
            }
            sleep(ASKED_AGAIN).await;
            without = wrong;
        }
    }

    /// Goes on with this peer where the one before has ended.
    async fn from(&mut self, peer: &PeerId, served: &Served) -> Result<(), DownloadError> {
        if served.nar_size != self.nar_size {
            return Err(DownloadError::OtherSize);
        }
        let before = self.got;
        let known = self.holders.peers.get(peer).ok_or(DownloadError::NotThere)?;
        let _in_flight = self.holders.peers.began(peer);
        let mut pace = Pace::new(self.stall, known.in_flight);
        self.waits_since = Instant::now();
        let arriving =
            self.holders.peers.client(&known)?.file(&served.nar_path, self.got, self.stall).await?;
        pace.all_waits += self.waits_since.elapsed();
        let mut arriving = arriving.ok_or(DownloadError::NotThere)?;
        let announced = arriving.remaining().map(|left| arriving.offset.saturating_add(left));
        if let Some(got) = announced.filter(|announced| *announced != self.nar_size) {
            return Err(DownloadError::Length { got, expected: self.nar_size });
        }
        let mut skip = self.got - arriving.offset;
        let mut is_sender = false;
        while self.got < self.nar_size {
            self.writer.room().await?;
            self.waits_since = Instant::now();
            let Some(mut chunk) = pace.next(&mut arriving).await? else {
                return Err(DownloadError::Length { got: self.got, expected: self.nar_size });
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
            self.take(chunk).await?;
        }
        self.prove().await?;
        self.holders.peers.delivered(peer, self.got - before, pace.all_waits);
        Ok(())
    }

    /// Takes the next bytes.
    async fn take(&mut self, chunk: Bytes) -> Result<(), DownloadError> {
        let end = self.got + chunk.len() as u64;
        if end > self.nar_size {
            return Err(DownloadError::Length { got: end, expected: self.nar_size });
        }
        if self.is_repeated {
            return self.compare(chunk).await;
        }
        self.got = end;
        if chunk.len() >= COPIED && self.tail.is_empty() {
            return self.hold(chunk).await;
        }
        self.tail.extend_from_slice(&chunk);
        if self.tail.len() < COPIED && self.got < self.nar_size {
            return Ok(());
        }
        let gathered = self.tail.split().freeze();
        self.hold(gathered).await
    }

    /// Hashes and holds the next bytes, and gives out those before.
    async fn hold(&mut self, bytes: Bytes) -> Result<(), DownloadError> {
        if !self.whole {
            self.give_out().await?;
        }
        self.hasher.update(&bytes);
        self.held.push(bytes);
        Ok(())
    }

    /// Takes bytes that were given out already: once more than all of those came, both have to be the same.
    async fn compare(&mut self, mut chunk: Bytes) -> Result<(), DownloadError> {
        let left = usize::try_from(self.given - self.got).unwrap_or(usize::MAX);
        let rest = if left < chunk.len() { chunk.split_off(left) } else { Bytes::new() };
        self.hasher.update(&chunk);
        self.got += chunk.len() as u64;
        if self.got < self.given {
            return Ok(());
        }
        if <[u8; 32]>::from(self.hasher.clone().finalize()) != self.given_digest {
            return Err(DownloadError::GivenOut);
        }
        self.is_repeated = false;
        if rest.is_empty() { Ok(()) } else { Box::pin(self.take(rest)).await }
    }

    /// Gives out all that is held. The hash so far is that of everything that was given out then.
    async fn give_out(&mut self) -> Result<(), DownloadError> {
        if self.held.is_empty() {
            return Ok(());
        }
        self.given += self.held.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        self.given_digest = self.hasher.clone().finalize().into();
        for bytes in std::mem::take(&mut self.held) {
            let appender = self.writer.appender();
            if self.writer.writes_to_disk() {
                spawn_blocking(move || appender.append(bytes)).await.map_err(|_| DownloadError::Stopped)?;
            } else {
                appender.append(bytes);
            }
        }
        Ok(())
    }

    async fn prove(&mut self) -> Result<(), DownloadError> {
        let digest = self.hasher.clone().finalize();
        if NarHash::from_digest(digest.into()) != self.nar_hash {
            return Err(DownloadError::Hash);
        }
        self.give_out().await
    }

    /// What came is not what was signed: all of it comes once more from others, and what was given out has to be its beginning.
    fn begin_anew(&mut self) {
        self.hasher = Sha256::new();
        self.got = 0;
        self.held.clear();
        self.tail.clear();
        self.senders.clear();
        self.is_repeated = self.given > 0;
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
        tracing::debug!(peer.id = %peer, %error, got_bytes = self.got, "a NAR does not come from this peer");
    }
}

/// Whether a peer sends fast enough: nothing for a while is too slow, and so is next to nothing for as long.
struct Pace {
    stall: Duration,
    lowest_rate: u64,
    all_waits: Duration,
    /// Since it was found fast enough.
    waited: Duration,
    came: u64,
}

impl Pace {
    /// `downloads` from this peer are under way, and share its link.
    fn new(stall: Duration, downloads: u32) -> Self {
        let lowest_rate = (LOWEST_RATE / u64::from(downloads.max(1))).max(LEAST_SHARE);
        Self { stall, lowest_rate, all_waits: Duration::ZERO, waited: Duration::ZERO, came: 0 }
    }

    /// The next bytes. Only the time that is waited for the peer counts, whatever the readers take.
    async fn next(&mut self, arriving: &mut Arriving) -> Result<Option<Bytes>, FetchError> {
        let began = Instant::now();
        let chunk =
            timeout(self.stall, arriving.chunk()).await.map_err(|_| FetchError::Timeout(self.stall))??;
        let waited = began.elapsed();
        self.waited += waited;
        self.all_waits += waited;
        self.came += chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
        if self.waited >= self.stall {
            if (self.came as f64) < self.lowest_rate as f64 * self.waited.as_secs_f64() {
                return Err(FetchError::Timeout(self.waited));
            }
            (self.waited, self.came) = (Duration::ZERO, 0);
        }
        Ok(chunk)
    }
}
