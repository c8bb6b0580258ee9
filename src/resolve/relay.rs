//! A NAR that a peer has: found, downloaded once for all who ask, and read as it comes.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::Stream;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::ahead::Ahead;
use super::download::Download;
use super::holders::{Holder, Holders};
use super::pace::LOWEST_RATE;
use crate::cache::{Begin, Piece, Prepare, Served, SpoolError, SpoolReader, SpoolWriter, Spools};
use crate::metrics::RelayMetrics;
use crate::nix::cache_url::NarUrl;
use crate::nix::narinfo::PathInfo;
use crate::nix::{NarHash, StorePathHash};
use crate::store::BufferPool;

/// How often it is looked for spools that nobody asks for any more.
const SWEEP_PERIOD: Duration = Duration::from_secs(5);

/// A NAR that a peer has.
#[derive(Debug)]
pub struct RelayedNar {
    /// Length in bytes.
    pub nar_size: u64,
    /// SHA-256.
    pub nar_hash: NarHash,
    relays: Relays,
    url: NarUrl,
    /// Unless it is there already.
    holder: Option<Holder>,
}

/// Fetches NARs from peers. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Relays {
    pub(super) holders: Holders,
    pub(super) spools: Spools,
    pub(super) buffers: BufferPool,
    pub(super) ahead: Ahead,
    pub(super) verify_first: u64,
    pub(super) stall: Duration,
    pub(super) metrics: RelayMetrics,
}

impl Relays {
    /// A NAR that is on its way, or that a peer has. `None`: no peer has it.
    pub(super) async fn nar(&self, url: &NarUrl) -> Option<RelayedNar> {
        let (url, relays) = (*url, self.clone());
        if let Some(nar_hash) = url.nar_hash
            && let Some(nar_size) = self.spools.len_of(&nar_hash)
            // NarSize may be nothing but a claim: what is on its way may be another one's wrong one.
            && self.holders.told_size(&url) == Some(nar_size)
        {
            return Some(RelayedNar { nar_size, nar_hash, relays, url, holder: None });
        }
        let holder = self.holders.find(&url, &[]).await?;
        let (nar_size, nar_hash) = (holder.served.nar_size, holder.served.nar_hash);
        Some(RelayedNar { nar_size, nar_hash, relays, url, holder: Some(holder) })
    }

    /// A client got this narinfo of a peer: its NAR may be downloaded before it is asked for.
    pub(super) fn told(&self, info: &PathInfo) {
        self.ahead.told(info.hash(), info.references.iter().map(StorePathHash::of));
    }

    /// Downloads what this client will most likely ask for next, while it is busy with what it has asked for.
    fn prepare(&self, asked: &StorePathHash) {
        for hash in self.ahead.asked(asked) {
            let Some(holder) = self.holders.remembered(&NarUrl { hash, nar_hash: None }, &[]) else {
                continue;
            };
            let Served { nar_hash, nar_size, .. } = holder.served;
            match self.spools.prepare(&nar_hash, nar_size) {
                Prepare::Write(writer) => {
                    self.metrics.prepared.inc();
                    let url = NarUrl { hash, nar_hash: Some(nar_hash) };
                    self.download(url, nar_hash, holder, nar_size <= self.verify_first, writer);
                }
                Prepare::IsThere => {}
                // What comes later may not take the place of what comes sooner.
                Prepare::NoRoom => break,
            }
        }
    }

    /// Lets go what nobody asks for any more, again and again. Ends when dropped.
    pub(super) async fn sweep(&self) {
        let mut ticks = interval(SWEEP_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.spools.sweep(Instant::now());
            let (memory, disk) = self.spools.taken();
            self.metrics.memory.set(i64::try_from(memory).unwrap_or(i64::MAX));
            self.metrics.disk.set(i64::try_from(disk).unwrap_or(i64::MAX));
        }
    }

    fn download(&self, url: NarUrl, nar_hash: NarHash, holder: Holder, whole: bool, writer: SpoolWriter) {
        tokio::spawn(Download::new(self, url, nar_hash, whole, writer).run(holder));
    }
}

impl RelayedNar {
    /// The bytes. `None`: no peer gives it after all. A failure midway is an error and never an end.
    pub async fn open(self) -> Option<impl Stream<Item = Result<Bytes, SpoolError>> + Send + use<>> {
        let whole = self.nar_size <= self.relays.verify_first;
        // Of what is verified first nothing can be sent before all of it came.
        let all_of_it = if whole { Duration::from_secs(self.nar_size / LOWEST_RATE) } else { Duration::ZERO };
        let opened = timeout(self.relays.stall * 2 + all_of_it, self.begin(whole)).await;
        let reader = opened.inspect_err(|_| tracing::info!("no peer began to send a NAR in time")).ok()??;
        Some(futures_util::stream::try_unfold(reader, |mut reader| async move {
            let Some(piece) = reader.piece().await? else { return Ok(None) };
            let bytes = match piece {
                Piece::Bytes(bytes) => bytes,
                on_disk @ Piece::File(..) => {
                    let read = spawn_blocking(move || on_disk.read()).await;
                    read.map_err(|_| SpoolError::Failed("the daemon stops".into()))??
                }
            };
            Ok(Some((bytes, reader)))
        }))
    }

    async fn begin(&self, whole: bool) -> Option<SpoolReader> {
        let Self { relays, url, nar_hash, nar_size, .. } = self;
        let reader = match relays.spools.begin(nar_hash, *nar_size, whole).await {
            Begin::Read(reader) => {
                relays.metrics.joined.inc();
                reader
            }
            Begin::Write(writer, reader) => {
                let holder = match &self.holder {
                    Some(holder) => holder.clone(),
                    None => relays.holders.find(url, &[]).await?,
                };
                let url = NarUrl { nar_hash: Some(*nar_hash), ..*url };
                relays.download(url, *nar_hash, holder, whole, writer);
                reader
            }
            Begin::Closed => return None,
        };
        relays.prepare(&url.hash);
        match reader.ready().await {
            Ok(()) => Some(reader),
            Err(error) => {
                tracing::info!(store_path.hash = %url.hash, %error, "no peer gives the NAR");
                None
            }
        }
    }
}
