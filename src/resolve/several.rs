//! One NAR from several peers at once: pieces for whoever is free, and their bytes to the readers in their order.
//!
//! Asks and waits; whom for what is decided in [`super::pieces`]. It begins with one peer, and those who turn out to have it too
//! join in. A peer that fails is blamed and left out; the last one that is left goes on alone, as if nobody else had been there, and so does one that is so fast that others gain nothing.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, FuturesUnordered, StreamExt as _};
use tokio::time::sleep;

use super::download::Download;
use super::download_error::DownloadError;
use super::fetch::{Failed, Fetch};
use super::holders::Holder;
use super::pieces::{Ask, Pieces};
use crate::cache::Memory;
use crate::peer::{Arriving, InFlight, PeerClient};

/// From how many peers a NAR comes at once at most.
const SOURCES: usize = 4;
/// How often it is looked whether a peer that has nothing to do would be sooner than a slow one.
const TICK: Duration = Duration::from_millis(50);

/// Peers that have it too, as they say so.
pub(super) type Others = BoxStream<'static, Holder>;

/// How it ended, if not with a failure of all.
pub(super) enum Ended {
    /// All came, and has proven right.
    Proven,
    /// One peer is left, or is fast enough alone, which may have begun to send all of it.
    Alone(Holder, Option<Box<Arriving>>),
}

/// A step of a fetch: what came.
type Step = (Fetch, Result<bytes::Bytes, Failed>);

/// What is under way.
struct Several {
    pieces: Pieces,
    sources: Vec<Source>,
    fetches: FuturesUnordered<BoxFuture<'static, Step>>,
    /// What came while something else was waited for.
    steps: VecDeque<Step>,
    others: Option<Others>,
}

/// A peer that sends pieces.
struct Source {
    holder: Holder,
    client: PeerClient,
    /// Downloads from it that are under way, this one too.
    downloads: u32,
    _in_flight: InFlight,
    is_free: bool,
    is_gone: bool,
    /// Bytes that were of use.
    sent: u64,
    waited: Duration,
}

impl Download {
    /// Goes on with this peer and with others. A peer that fails is blamed here.
    pub(super) async fn several(
        &mut self,
        first: Holder,
        others: Others,
        memory: &Memory,
    ) -> Result<Ended, DownloadError> {
        let mut several = Several {
            pieces: Pieces::new(self.verified.got()..self.verified.nar_size(), memory.bytes()),
            sources: Vec::new(),
            fetches: FuturesUnordered::new(),
            steps: VecDeque::new(),
            others: Some(others),
        };
        if let Err(error) = self.joins(&mut several, first.clone()) {
            self.failed(&first, &error, Duration::ZERO);
            return Err(error);
        }
        loop {
            let is_fast = several.pieces.fastest().is_some_and(|(_, is_fast)| is_fast);
            if is_fast {
                several.others = None;
            }
            if is_fast || (several.pieces.left() == 1 && several.others.is_none()) {
                several.pieces.freeze();
            }
            if several.pieces.is_over() {
                break;
            }
            self.hand_out(&mut several);
            if let Some(step) = several.steps.pop_front() {
                if let Some(ended) = self.came(&mut several, step)? {
                    return Ok(ended);
                }
                continue;
            }
            let (has_bytes, has_free) = (several.pieces.has_bytes(), several.has_free());
            tokio::select! {
                Some(step) = several.fetches.next() => several.steps.push_back(step),
                found = next(&mut several.others) => match found {
                    Some(holder) if several.pieces.left() < SOURCES => {
                        // One that can't be asked is no loss: there are others.
                        let _ = self.joins(&mut several, holder);
                    }
                    _ => several.others = None,
                },
                room = self.verified.room(), if has_bytes => {
                    room?;
                    self.take(&mut several).await?;
                }
                () = sleep(TICK), if has_free => {}
            }
        }
        for source in several.sources.iter().filter(|source| !source.is_gone) {
            self.sent.push((source.holder.peer.clone(), source.sent, source.waited));
        }
        if self.verified.got() == self.verified.nar_size() {
            self.verified.prove().await?;
            return Ok(Ended::Proven);
        }
        let fastest = several.pieces.fastest().and_then(|(number, _)| several.sources.get(number));
        let last = fastest.ok_or(DownloadError::NotThere)?.holder.clone();
        Ok(Ended::Alone(last, None))
    }

    fn joins(&self, several: &mut Several, holder: Holder) -> Result<(), DownloadError> {
        let peers = &self.holders.peers;
        if holder.served.nar_size != self.verified.nar_size() {
            return Err(DownloadError::OtherSize);
        }
        let in_flight = peers.began(&holder.peer);
        let known = peers.get(&holder.peer).ok_or(DownloadError::NotThere)?;
        let client = peers.client(&known)?;
        several.pieces.add_source();
        several.sources.push(Source {
            holder,
            client,
            downloads: known.in_flight,
            _in_flight: in_flight,
            is_free: true,
            is_gone: false,
            sent: 0,
            waited: Duration::ZERO,
        });
        Ok(())
    }

    /// Asks whoever is free for what is to be asked for.
    fn hand_out(&self, several: &mut Several) {
        let now = Instant::now();
        for (number, source) in several.sources.iter_mut().enumerate() {
            if !source.is_free || source.is_gone {
                continue;
            }
            let Some(ask) = several.pieces.ask(number, now) else { continue };
            self.metrics.pieces.inc();
            let range = match ask {
                Ask::New(range) => range,
                Ask::Again(range) => {
                    self.metrics.reassigned.inc();
                    range
                }
            };
            source.is_free = false;
            let (client, path) = (source.client.clone(), source.holder.served.nar_path.clone());
            let fetch = Fetch::new(number, client, path, range, self.stall, source.downloads);
            several.fetches.push(Box::pin(fetch.next()));
        }
    }

    /// Something came, or failed.
    fn came(&mut self, several: &mut Several, step: Step) -> Result<Option<Ended>, DownloadError> {
        let (fetch, result) = step;
        let number = fetch.source;
        let Some(source) = several.sources.get_mut(number) else { return Ok(None) };
        let failed = match result {
            Ok(bytes) => {
                let came = several.pieces.came(number, bytes, Instant::now());
                source.sent += came.new;
                if came.new > 0 {
                    self.sends(&source.holder);
                }
                if came.is_over {
                    source.is_free = true;
                    source.waited += fetch.all_waits();
                } else {
                    several.fetches.push(Box::pin(fetch.next()));
                }
                return Ok(None);
            }
            Err(failed) => failed,
        };
        source.is_gone = true;
        several.pieces.gone(number);
        let holder = source.holder.clone();
        let error = match failed {
            Failed::Download(error) => error,
            Failed::NoRanges(whole) if several.pieces.left() == 0 && !several.pieces.has_begun() => {
                return Ok(Some(Ended::Alone(holder, Some(whole))));
            }
            Failed::NoRanges(_) => {
                tracing::debug!(peer.id = %holder.peer, "a peer gives no parts of a NAR");
                return if several.pieces.left() > 0 {
                    Ok(None)
                } else {
                    Ok(Some(Ended::Alone(holder, None)))
                };
            }
        };
        self.failed(&holder, &error, fetch.waits_since.elapsed());
        if several.pieces.left() == 0 {
            return Err(error);
        }
        self.metrics.failovers.inc();
        Ok(None)
    }

    /// Takes what comes next. Peers are waited for meanwhile: it may have to be written to disk.
    async fn take(&mut self, several: &mut Several) -> Result<(), DownloadError> {
        let Some(bytes) = several.pieces.take() else { return Ok(()) };
        let mut taking = pin!(self.verified.take(bytes));
        loop {
            tokio::select! {
                taken = &mut taking => return taken,
                Some(step) = several.fetches.next() => several.steps.push_back(step),
            }
        }
    }
}

impl Several {
    fn has_free(&self) -> bool {
        self.sources.iter().any(|source| source.is_free && !source.is_gone)
    }
}

/// The next one who has it; never, once all were asked.
async fn next(others: &mut Option<Others>) -> Option<Holder> {
    match others {
        Some(others) => others.next().await,
        None => std::future::pending().await,
    }
}
