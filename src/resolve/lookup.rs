//! Finding a narinfo on the LAN: all candidates at once, the first good answer, one budget for all of it.
//!
//! One flight a hash, owned by the daemon and not by the request that began it: whoever asks meanwhile waits for the same
//! answer, unless news came since it began: its questions may be older than they. A miss is remembered only if every peer that may be asked said "not here".

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::{Stream, StreamExt as _, stream};
use moka::sync::Cache;
use nix_narinfo::Compression;
use tokio::sync::watch;
use tokio::time::{sleep, timeout_at};

use crate::cache::{Misses, Origin, PeerCache, Question, Served};
use crate::metrics::LookupMetrics;
use crate::nix::cache_url::rebuilt_nar_path;
use crate::nix::narinfo::NarInfo;
use crate::nix::{NarHash, Signature, StoreDir, StorePathHash};
use crate::peer::{Blame, Peer, PeerId, Peers};
use crate::trust::{Trust, TrustedNarInfo};

/// Whoever waits for somebody else's flight waits a little longer than that may take.
const GRACE: Duration = Duration::from_millis(50);
/// Peers that one lookup asks at the same time.
const AT_ONCE: usize = 32;
/// And besides them peers that never answered: silent ones take nobody else's turn.
const NEWCOMERS_AT_ONCE: usize = 16;
/// How much later than its questions a flight ends.
const LAST_WORD: Duration = Duration::from_millis(10);
/// Signatures of one narinfo: each that may be a trusted key's takes time to check.
const MAX_SIGNATURES: usize = 64;
/// Names of keys that are told of what nobody trusted has signed, and the characters of each.
const NAMES_TOLD: usize = 8;
const NAME_LENGTH: usize = 64;
/// After how long it is said once more of a peer that its paths are not passed on.
const SAID_AGAIN: Duration = Duration::from_secs(300);
/// The first pause before a peer that can't be reached is tried again.
const FIRST_RETRY: Duration = Duration::from_millis(20);

/// A narinfo that was found, and the peer that had it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) peer: PeerId,
    pub(super) narinfo: Arc<TrustedNarInfo>,
    pub(super) served: Served,
}

/// What is looked for. One flight for each.
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
    fn is_general(&self) -> bool {
        self.nar_hash.is_none() && self.without.is_empty()
    }
}

/// Takes a flight off the list however it ends, so that the next one who asks begins anew.
struct Landing {
    lookup: Lookup,
    sought: Sought,
    question: Arc<Question>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        let mut flights = self.lookup.0.flights.lock().unwrap_or_else(PoisonError::into_inner);
        // News may have let a younger one begin in its place.
        if flights.get(&self.sought).is_some_and(|flight| Arc::ptr_eq(&flight.question, &self.question)) {
            flights.remove(&self.sought);
        }
    }
}

/// A lookup that is under way.
#[derive(Debug)]
struct Flight {
    /// Open since before the first peer was asked.
    question: Arc<Question>,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// How a lookup ended.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Found(Found),
    /// Every peer said so.
    Missing,
    /// Some did not say.
    Unknown,
}

/// Asks peers. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub(super) struct Lookup(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    parts: Parts,
    flights: Mutex<HashMap<Sought, Flight>>,
    /// Peers of which it was said that their paths are not passed on.
    untrusted: Cache<PeerId, ()>,
}

/// What a lookup is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) peers: Peers,
    pub(super) misses: Misses,
    pub(super) cache: PeerCache,
    pub(super) trust: Trust,
    pub(super) store_dir: StoreDir,
    /// One deadline for all of it.
    pub(super) budget: Duration,
    pub(super) metrics: LookupMetrics,
}

/// What one peer said.
enum Said {
    Here(Box<NarInfo>),
    NotHere,
    Nothing,
}

impl Lookup {
    pub(super) fn new(parts: Parts) -> Self {
        let untrusted = Cache::builder().max_capacity(1024).time_to_live(SAID_AGAIN).build();
        Self(Arc::new(Inner { parts, flights: Mutex::default(), untrusted }))
    }

    /// Finds a narinfo. `None`: nobody has it, or nobody said so in time. May be dropped midway.
    pub(super) async fn find(&self, sought: Sought) -> Option<Found> {
        if self.0.parts.misses.contains(&sought.hash) {
            self.0.parts.metrics.outcome("remembered_miss", 0.0);
            return None;
        }
        let mut flight = self.join_or_begin(sought);
        let deadline = tokio::time::Instant::now() + self.0.parts.budget + GRACE;
        // An error is a flight that ended without a word: nothing is known then.
        let landed = timeout_at(deadline, flight.wait_for(Option::is_some)).await;
        match landed.ok()?.ok()?.clone()? {
            Outcome::Found(found) => Some(found),
            Outcome::Missing | Outcome::Unknown => None,
        }
    }

    /// Whoever else has it, as they answer, within the budget. At most so many are asked; `None`: there is nobody to ask.
    /// Dropping it asks no more.
    pub(super) fn others(
        &self,
        sought: Sought,
        most: usize,
    ) -> Option<impl Stream<Item = Found> + Send + use<>> {
        let (candidates, _) = self.0.parts.peers.candidates(&sought.hash);
        let is_other = |peer: &Peer| !sought.without.contains(&peer.id);
        let asked: Vec<Peer> = candidates.into_iter().filter(is_other).take(most).collect();
        if asked.is_empty() {
            return None;
        }
        let (lookup, deadline) = (self.clone(), Instant::now() + self.0.parts.budget);
        let answers = stream::iter(asked).map(move |peer| {
            let (lookup, sought) = (lookup.clone(), sought.clone());
            async move {
                match lookup.ask(peer, sought.hash, deadline).await {
                    (peer, Said::Here(narinfo)) => lookup.believe(&peer, &sought, *narinfo),
                    _ => None,
                }
            }
        });
        Some(answers.buffer_unordered(AT_ONCE).filter_map(std::future::ready))
    }

    /// Whether nobody has it, as far as that is known without asking: every peer said so, or there is none.
    pub(super) fn is_missing(&self, hash: &StorePathHash) -> bool {
        let Parts { peers, misses, metrics, .. } = &self.0.parts;
        if misses.contains(hash) {
            metrics.outcome("remembered_miss", 0.0);
            return true;
        }
        let is_missing = peers.all_deny(hash);
        if is_missing {
            metrics.outcome("missing", 0.0);
        }
        is_missing
    }

    /// The peer that is remembered proved wrong.
    pub(super) fn forget(&self, hash: &StorePathHash, peer: &PeerId) {
        self.0.parts.cache.forget(hash, &Origin::Peer(peer.clone()));
    }

    fn join_or_begin(&self, sought: Sought) -> watch::Receiver<Option<Outcome>> {
        let mut flights = self.0.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&sought).filter(|flight| flight.question.is_fresh()) {
            self.0.parts.metrics.joined.inc();
            return flight.outcome.clone();
        }
        let (sender, receiver) = watch::channel(None);
        let question = Arc::new(self.0.parts.misses.ask(sought.hash));
        let flight = Flight { question: Arc::clone(&question), outcome: receiver.clone() };
        flights.insert(sought.clone(), flight);
        let landing = Landing { lookup: self.clone(), sought, question };
        tokio::spawn(async move {
            let began = Instant::now();
            let lookup = landing.lookup.clone();
            let outcome = lookup.fly(&landing.sought, &landing.question).await;
            lookup.0.parts.metrics.outcome(outcome.name(), began.elapsed().as_secs_f64());
            // Off the list first: whoever comes now begins anew and finds what was remembered.
            drop(landing);
            sender.send_replace(Some(outcome));
        });
        receiver
    }

    async fn fly(&self, sought: &Sought, question: &Question) -> Outcome {
        let hash = sought.hash;
        let deadline = tokio::time::Instant::now() + self.0.parts.budget;
        let (candidates, somebody_is_left_out) = self.0.parts.peers.candidates(&hash);
        let candidates = candidates.into_iter().filter(|peer| !sought.without.contains(&peer.id));
        // Many at once, and the next as they answer: however many are known, sockets are few.
        let (proven, newcomers): (Vec<Peer>, Vec<Peer>) = candidates.partition(Peer::is_proven);
        let ask = |peers: Vec<Peer>| {
            stream::iter(peers.into_iter().map(|peer| self.ask(peer, hash, deadline.into_std())))
        };
        let proven = ask(proven).buffer_unordered(AT_ONCE);
        let mut asked = stream::select(proven, ask(newcomers).buffer_unordered(NEWCOMERS_AT_ONCE));
        let mut all_said_so = !somebody_is_left_out;
        loop {
            // A little after the deadline that each question has itself: the silent are noted as such.
            match timeout_at(deadline + LAST_WORD, asked.next()).await {
                Ok(Some((peer, Said::Here(narinfo)))) => match self.believe(&peer, sought, *narinfo) {
                    Some(found) => return Outcome::Found(found),
                    None => all_said_so = false,
                },
                Ok(Some((_, Said::NotHere))) => {}
                Ok(Some((_, Said::Nothing))) => all_said_so = false,
                Ok(None) if all_said_so && sought.is_general() => {
                    question.nobody_has_it();
                    return Outcome::Missing;
                }
                Ok(None) | Err(_) => return Outcome::Unknown,
            }
        }
    }

    /// Asks one peer, again with growing pauses while it can't be reached and there is time.
    async fn ask(&self, peer: Peer, hash: StorePathHash, deadline: Instant) -> (Peer, Said) {
        let Ok(client) = self.0.parts.peers.client(&peer) else { return (peer, Said::Nothing) };
        let _in_flight = self.0.parts.peers.began(&peer.id);
        let mut pauses = ExponentialBuilder::default().with_min_delay(FIRST_RETRY).with_jitter().build();
        loop {
            let began = Instant::now();
            let left = deadline.saturating_duration_since(began);
            match client.narinfo(&hash, left).await {
                Ok(text) => {
                    let took = began.elapsed();
                    let said = match text.map(|text| self.read(&text, &hash)).transpose() {
                        Ok(narinfo) => narinfo.map_or(Said::NotHere, |narinfo| Said::Here(Box::new(narinfo))),
                        Err(lie) => {
                            self.0.parts.peers.lied(&peer.id, &lie);
                            return (peer, Said::Nothing);
                        }
                    };
                    self.0.parts.peers.succeeded(&peer.id, took);
                    return (peer, said);
                }
                Err(error) => {
                    let pause = pauses.next().filter(|_| error.blame() == Blame::Network);
                    match pause.filter(|pause| Instant::now() + *pause < deadline) {
                        Some(pause) => sleep(pause).await,
                        None => {
                            self.0.parts.peers.failed(&peer.id, &error, began.elapsed());
                            return (peer, Said::Nothing);
                        }
                    }
                }
            }
        }
    }

    /// Reads what a peer gave as the narinfo of a path; or what is wrong with it on its face.
    fn read(&self, text: &[u8], hash: &StorePathHash) -> Result<NarInfo, String> {
        let narinfo = NarInfo::parse(text, &self.0.parts.store_dir)
            .map_err(|error| format!("a narinfo that is none: {error}"))?;
        if narinfo.info.signatures.len() > MAX_SIGNATURES {
            return Err(format!("a narinfo with {} signatures", narinfo.info.signatures.len()));
        }
        if narinfo.info.hash() == *hash { Ok(narinfo) } else { Err("the narinfo of another path".to_owned()) }
    }

    /// Checks what a peer said.
    fn believe(&self, peer: &Peer, sought: &Sought, narinfo: NarInfo) -> Option<Found> {
        let hash = &sought.hash;
        if sought.nar_hash.is_some_and(|wanted| wanted != narinfo.info.nar_hash) {
            // Built there with another outcome: no lie, and not what is looked for.
            return None;
        }
        if narinfo.file.compression != Compression::None {
            tracing::debug!(peer.id = %peer.id, "a peer has the path packed, which is not relayed");
            return None;
        }
        let signed_by = key_names(&narinfo);
        match self.0.parts.trust.verify(narinfo) {
            Ok(narinfo) => {
                let info = &narinfo.narinfo().info;
                let (nar_hash, nar_size) = (info.nar_hash, info.nar_size);
                let Some(nar_path) = rebuilt_nar_path(&narinfo.narinfo().file.url, hash, &nar_hash) else {
                    tracing::debug!(peer.id = %peer.id, "a peer names a NAR in a way that is not known");
                    return None;
                };
                let (origin, told) = (Origin::Peer(peer.id.clone()), Some(Instant::now()));
                let served = Served { origin, nar_hash, nar_size, nar_path, told };
                self.0.parts.cache.remember(*hash, served.clone());
                Some(Found { peer: peer.id.clone(), narinfo: Arc::new(narinfo), served })
            }
            Err(error) => {
                // A path that was built there and whose key is not trusted here is no lie.
                self.0.parts.metrics.untrusted.inc();
                // It may have thousands of such paths: the first says what to do.
                if self.0.untrusted.entry(peer.id.clone()).or_insert(()).is_fresh() {
                    tracing::info!(peer.url, signed_by, store_path.hash = %hash, %error, "a peer's path is not passed on");
                } else {
                    tracing::debug!(peer.id = %peer.id, store_path.hash = %hash, %error, "another path is not passed on");
                }
                None
            }
        }
    }
}

/// By whom it says to be signed.
fn key_names(narinfo: &NarInfo) -> String {
    let signatures = narinfo.info.signatures.iter().take(NAMES_TOLD);
    let name = |signature: &Signature| signature.key_name.chars().take(NAME_LENGTH).collect::<String>();
    signatures.map(name).collect::<Vec<_>>().join(" ")
}

impl Outcome {
    fn name(&self) -> &'static str {
        match self {
            Self::Found(_) => "found",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
        }
    }
}
