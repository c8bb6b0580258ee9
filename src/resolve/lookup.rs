//! Finding a narinfo on the LAN: all candidates at once, the first good answer, one budget for all of it.
//!
//! One flight a hash, owned by the daemon and not by the request that began it: whoever asks meanwhile waits for the same
//! answer, unless news came since it began: its questions may be older than they. A miss is remembered only if every peer that may be asked said "not here".

use std::collections::HashMap;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout, timeout_at};

use super::beliefs::{Beliefs, served};
use super::sought::{Found, Sought};
use crate::cache::{HOLDERS, Misses, Origin, PeerCache, Question, Served};
use crate::metrics::LookupMetrics;
use crate::nix::StorePathHash;
use crate::nix::narinfo::NarInfo;
use crate::peer::{Blame, Peer, PeerId, Peers};

/// Whoever waits for somebody else's flight waits a little longer than that may take.
const GRACE: Duration = Duration::from_millis(50);
/// Peers that one lookup asks at the same time.
const AT_ONCE: usize = 32;
/// And besides them peers that never answered: silent ones take nobody else's turn.
const NEWCOMERS_AT_ONCE: usize = 16;
/// How much later than its questions a flight ends.
const LAST_WORD: Duration = Duration::from_millis(10);
/// How long after the first good answer others are heard that are on their way: they say who has it too.
const HEARD_OUT: Duration = Duration::from_millis(50);
/// The first pause before a peer that can't be reached is tried again.
const FIRST_RETRY: Duration = Duration::from_millis(20);

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
}

/// What a lookup is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) peers: Peers,
    pub(super) misses: Misses,
    pub(super) cache: PeerCache,
    pub(super) beliefs: Beliefs,
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
        Self(Arc::new(Inner { parts, flights: Mutex::default() }))
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
        Some(self.questions(asked, sought.hash, deadline).filter_map(move |(peer, said)| {
            let found = match said {
                Said::Here(narinfo) => lookup.0.parts.beliefs.believe(&peer, &sought, *narinfo),
                Said::NotHere | Said::Nothing => None,
            };
            found.iter().for_each(|found| lookup.0.parts.cache.also(sought.hash, found.served.clone()));
            std::future::ready(found)
        }))
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
            let Sought { hash, without, .. } = &landing.sought;
            let hash = *hash;
            let deadline = began + lookup.0.parts.budget;
            let (mut candidates, somebody_is_left_out) = lookup.0.parts.peers.candidates(&hash);
            candidates.retain(|peer| !without.contains(&peer.id));
            let mut answers = pin!(lookup.questions(candidates, hash, deadline));
            let fly = lookup.fly(answers.as_mut(), deadline, &landing.sought, !somebody_is_left_out);
            let outcome = fly.await;
            if matches!(outcome, Outcome::Missing) {
                landing.question.nobody_has_it();
            }
            lookup.0.parts.metrics.outcome(outcome.name(), began.elapsed().as_secs_f64());
            // Off the list first: whoever comes now begins anew and finds what was remembered.
            drop(landing);
            sender.send_replace(Some(outcome.clone()));
            if let Outcome::Found(found) = outcome {
                let _ = timeout(HEARD_OUT, lookup.hear_out(answers, hash, &found.served)).await;
            }
        });
        receiver
    }

    /// Asks many at once, and the next as they answer: however many are known, sockets are few.
    fn questions(
        &self,
        peers: Vec<Peer>,
        hash: StorePathHash,
        deadline: Instant,
    ) -> impl Stream<Item = (Peer, Said)> + Send + use<> {
        let (proven, newcomers): (Vec<Peer>, Vec<Peer>) = peers.into_iter().partition(Peer::is_proven);
        let ask = |peers: Vec<Peer>| {
            let lookup = self.clone();
            stream::iter(peers).map(move |peer| {
                let lookup = lookup.clone();
                async move { lookup.ask(peer, hash, deadline).await }
            })
        };
        let proven = ask(proven).buffer_unordered(AT_ONCE);
        stream::select(proven, ask(newcomers).buffer_unordered(NEWCOMERS_AT_ONCE))
    }

    async fn fly(
        &self,
        mut answers: Pin<&mut impl Stream<Item = (Peer, Said)>>,
        deadline: Instant,
        sought: &Sought,
        all_are_asked: bool,
    ) -> Outcome {
        // A little after the deadline that each question has itself: the silent are noted as such.
        let deadline = tokio::time::Instant::from_std(deadline) + LAST_WORD;
        let mut all_said_so = all_are_asked;
        loop {
            match timeout_at(deadline, answers.next()).await {
                Ok(Some((peer, Said::Here(narinfo)))) => {
                    match self.0.parts.beliefs.believe(&peer, sought, *narinfo) {
                        Some(found) => {
                            self.0.parts.cache.remember(sought.hash, found.served.clone());
                            return Outcome::Found(found);
                        }
                        None => all_said_so = false,
                    }
                }
                Ok(Some((_, Said::NotHere))) => {}
                Ok(Some((_, Said::Nothing))) => all_said_so = false,
                Ok(None) if all_said_so && sought.is_general() => return Outcome::Missing,
                Ok(None) | Err(_) => return Outcome::Unknown,
            }
        }
    }

    /// Who else has what was found, of those who were asked: their answers are on their way. That they have it is a claim; what
    /// they send is checked against what was proven.
    async fn hear_out(
        &self,
        mut answers: Pin<&mut impl Stream<Item = (Peer, Said)>>,
        hash: StorePathHash,
        found: &Served,
    ) {
        let mut known = 1;
        while known < HOLDERS
            && let Some((peer, said)) = answers.next().await
        {
            let Said::Here(narinfo) = said else { continue };
            let facts = (narinfo.info.nar_hash, narinfo.info.nar_size);
            if facts == (found.nar_hash, found.nar_size)
                && let Some(served) = served(&peer, &narinfo)
            {
                known += 1;
                self.0.parts.cache.also(hash, served);
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
                    let said = match text.map(|text| self.0.parts.beliefs.read(&text, &hash)).transpose() {
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
