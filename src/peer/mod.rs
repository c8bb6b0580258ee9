//! Peers: who is there, how good they are, and the way to each.
//!
//! Found by announcement, by multicast DNS and by configuration; known by instance id; checked when silent; saved
//! for the next start. Knows nothing of stores and trust: what a peer says is a claim, and is passed up as one.

mod arriving;
mod blame;
mod candidates;
mod client;
mod discovery;
mod fetch_error;
mod flushes;
mod follow;
mod greetings;
mod interfaces;
mod link;
mod listening;
mod local_paths;
mod mdns;
mod news;
mod options;
mod path_filter;
mod path_set;
mod record;
mod registry;
mod saved;
mod sets;
mod tls;
mod udp;
mod unpack;
mod wire;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{Notify, broadcast};

pub use arriving::Arriving;
pub use blame::{Failure, Standing};
pub use client::{INSTANCE_HEADER, LINK_HEADER, PEER_HEADER, PeerClient};
pub use discovery::Discovery;
pub use fetch_error::{Blame, FetchError};
pub use listening::Listening;
pub use local_paths::LocalPaths;
pub use news::News;
pub use options::{ConfiguredPeer, Options};
pub use path_filter::PathFilter;
pub use path_set::{MAX_GAINS, Told, known_number};
pub use record::{Asking, Peer, PeerId, Source};
pub use registry::{Answered, Registry, Sighting};
pub use sets::WAIT as HOLDINGS_WAIT;
pub use tls::http_client;
pub use wire::{Announce, FEATURE_GAINED, FEATURE_HOLDINGS, Message};

use self::flushes::Flushes;
use self::news::NEWS;
use self::sets::Sets;
use crate::metrics::PeerMetrics;

/// The peers of this host. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct Peers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Mutex<Registry>,
    clients: Mutex<HashMap<PeerId, PeerClient>>,
    sets: Sets,
    allow: Box<[IpNet]>,
    own_id: String,
    own: Mutex<Announce>,
    listening: Listening,
    news: broadcast::Sender<News>,
    flushes: Mutex<Flushes>,
    /// A flush was put off: the next one may be due sooner.
    put_off: Notify,
    metrics: PeerMetrics,
}

/// A request to a peer that is under way; dropping it says that it has ended.
#[derive(Debug)]
pub struct InFlight {
    peers: Peers,
    id: PeerId,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.peers.registry().ended(&self.id);
    }
}

impl Peers {
    /// Nobody but the configured. Only hosts in `allow` are let in by what they say; `own` is what this host says of itself,
    /// and `listening` where it is reached; its id has to be set, its port comes from there.
    #[must_use]
    pub fn new(
        options: &Options,
        configured: &[ConfiguredPeer],
        allow: &[IpNet],
        mut own: Announce,
        listening: Listening,
        metrics: PeerMetrics,
    ) -> Self {
        own.port = listening.port();
        let own_id = own.id.clone().unwrap_or_default();
        let mut registry = Registry::new(own_id.clone(), options.ttl, options.peers);
        let now = Instant::now();
        for peer in configured {
            registry.configured(&peer.url, now);
        }
        metrics.known.set(registry.len() as i64);
        let news = broadcast::Sender::new(NEWS);
        Self(Arc::new(Inner {
            registry: Mutex::new(registry),
            clients: Mutex::default(),
            sets: Sets::new(metrics.clone()),
            allow: allow.into(),
            own_id,
            own: Mutex::new(own),
            listening,
            news,
            flushes: Mutex::default(),
            put_off: Notify::new(),
            metrics,
        }))
    }

    /// A fresh instance id: 16 hexadecimal digits.
    pub fn fresh_id() -> Result<String, getrandom::Error> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes)?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// What this host says of itself.
    #[must_use]
    pub fn own_announce(&self) -> Announce {
        self.0.own.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same for one destination; `None` if what is sent there comes from where nobody listens: those who hear it
    /// could only ask there in vain.
    fn own_announce_to(&self, to: SocketAddr) -> Option<Announce> {
        let port = self.0.listening.port_at(interfaces::source_to(to)?)?;
        Some(Announce { port, ..self.own_announce() })
    }

    /// The instance id of this host.
    #[must_use]
    pub fn own_id(&self) -> &str {
        &self.0.own_id
    }

    /// What the Nix of this host says of its version, from the next announcement on.
    pub fn set_nix_version(&self, version: &str) {
        self.0.own.lock().unwrap_or_else(PoisonError::into_inner).nix_version = version.to_owned();
    }

    /// All peers, as they are now.
    #[must_use]
    pub fn all(&self) -> Vec<Peer> {
        self.registry().all()
    }

    /// How many are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.registry().len()
    }

    /// Whether nobody is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One peer, as it is now.
    #[must_use]
    pub fn get(&self, id: &PeerId) -> Option<Peer> {
        self.registry().get(id).cloned()
    }

    /// The way to a peer.
    pub fn client(&self, peer: &Peer) -> Result<PeerClient, FetchError> {
        let known = self.clients().get(&peer.id).filter(|client| client.leads_to(peer)).cloned();
        if let Some(client) = known {
            return Ok(client);
        }
        // Not under the lock, where all others would wait: it may read this system's certificates.
        let made = PeerClient::new(peer, self.own_id(), self.0.metrics.wire_bytes.clone())?;
        let mut clients = self.clients();
        // Somebody else may have made one meanwhile, and its connections are worth keeping.
        if let Some(client) = clients.get(&peer.id).filter(|client| client.leads_to(peer)) {
            return Ok(client.clone());
        }
        let registry = self.registry();
        // Whoever was forgotten since the caller looked is not kept here for ever.
        if registry.get(&peer.id).is_some() {
            // Some leave the table without a word: made room for, or started again as another.
            if clients.len() > registry.len() {
                clients.retain(|id, _| registry.get(id).is_some());
            }
            clients.insert(peer.id.clone(), made.clone());
        }
        Ok(made)
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<PeerId, PeerClient>> {
        self.0.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request to a peer begins.
    #[must_use]
    pub fn began(&self, id: &PeerId) -> InFlight {
        self.registry().began(id);
        InFlight { peers: self.clone(), id: id.clone() }
    }

    /// It answered as it should.
    pub fn succeeded(&self, id: &PeerId, latency: Duration) {
        self.0.metrics.request("ok", latency.as_secs_f64());
        let answered = self.registry().succeeded(id, latency, Instant::now());
        if answered.is_back {
            tracing::info!(peer.url = self.url_of(id), "a peer answers again");
        }
        if answered.is_new {
            let address = self.registry().get(id).and_then(|peer| peer.address);
            self.flush(address.map_or(Ipv4Addr::UNSPECIFIED.into(), |address| address.ip()), News::Came);
        }
    }

    /// It delivered so many bytes in this time.
    pub fn delivered(&self, id: &PeerId, bytes: u64, took: Duration) {
        self.0.metrics.relayed_bytes.inc_by(bytes);
        self.registry().delivered(id, bytes, took);
    }

    /// It failed. Our own failures are not counted against it.
    pub fn failed(&self, id: &PeerId, error: &FetchError, after: Duration) {
        self.count(id, Failure::NoAnswer, error, after);
    }

    /// A NAR that it said it has did not come. Our own failures are not counted against it.
    pub fn did_not_deliver(&self, id: &PeerId, error: &FetchError, after: Duration) {
        self.count(id, Failure::NoDelivery, error, after);
    }

    fn count(&self, id: &PeerId, failure: Failure, error: &FetchError, after: Duration) {
        let outcome = match error.blame() {
            Blame::Peer => "wrong",
            Blame::Network => "unreachable",
            Blame::Us => "not_made",
        };
        self.0.metrics.request(outcome, after.as_secs_f64());
        if matches!(error, FetchError::Replaced) && failure == Failure::NoAnswer {
            self.replaced(id);
        } else if error.blame() != Blame::Us {
            let now = Instant::now();
            // The place that failed: it may be another from now on.
            let (began, url) = (now.checked_sub(after).unwrap_or(now), self.url_of(id));
            let pause = self.registry().failed(id, failure, began, now);
            tell_pause(&url, pause, error);
        }
        tracing::debug!(peer.id = %id, %error, "a peer gave no answer");
    }

    /// Whoever answers in its place announces itself, and is known by that: both would be asked otherwise.
    fn replaced(&self, id: &PeerId) {
        let url = self.url_of(id);
        let (was_known, left) = {
            let mut registry = self.registry();
            (registry.forget(id), registry.len())
        };
        if was_known {
            self.left(id, left);
            tracing::info!(peer.url = url, "a peer was started again, and what it was before is forgotten");
        }
    }

    fn left(&self, id: &PeerId, still_known: usize) {
        self.0.metrics.known.set(still_known as i64);
        self.clients().remove(id);
    }

    /// It said what is not so.
    pub fn lied(&self, id: &PeerId, lie: &str) {
        self.0.metrics.lies.inc();
        let now = Instant::now();
        let pause = self.registry().failed(id, Failure::Lie, now, now);
        tell_pause(&self.url_of(id), pause, &lie);
        tracing::warn!(peer.id = %id, lie, "a peer said what is not so");
    }

    fn url_of(&self, id: &PeerId) -> String {
        self.registry().get(id).map(|peer| peer.url.clone()).unwrap_or_default()
    }

    fn announced(&self, announce: Announce, from: SocketAddr, source: Source) -> Sighting {
        let address = from.ip().to_canonical();
        if !self.0.allow.iter().any(|network| network.contains(&address)) {
            return Sighting::Refused;
        }
        let port = announce.port;
        let sighting = {
            let mut registry = self.registry();
            let sighting = registry.announced(announce, from, source, Instant::now());
            self.0.metrics.known.set(registry.len() as i64);
            sighting
        };
        if sighting == Sighting::New && source != Source::Saved {
            let mut asked_at = from;
            asked_at.set_port(port);
            // Ids are made up easily: whoever announces one after the other neither fills the log nor empties the misses.
            if self.flush(address, News::Came) {
                tracing::info!(from = %asked_at, ?source, "a peer came");
            } else {
                tracing::debug!(from = %asked_at, ?source, "another peer came");
            }
        }
        sighting
    }

    fn goodbye(&self, id: &str, from: IpAddr) {
        let (was_known, left) = {
            let mut registry = self.registry();
            (registry.goodbye(id, from), registry.len())
        };
        if was_known {
            self.left(&PeerId::instance(id), left);
            tracing::info!(peer.id = id, "a peer said goodbye");
        }
    }

    /// Strangers can't make us forget what is missed.
    fn knows(&self, from: IpAddr) -> bool {
        self.registry().knows(from)
    }

    fn metrics(&self) -> &PeerMetrics {
        &self.0.metrics
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.0.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets whoever was silent for too long, and the ways to them.
    fn expire(&self) {
        let (gone, left) = {
            let mut registry = self.registry();
            (registry.expire(Instant::now()), registry.len())
        };
        self.0.metrics.known.set(left as i64);
        let mut clients = self.clients();
        for id in gone {
            tracing::info!(peer.id = %id, "a peer was silent for too long and is forgotten");
            clients.remove(&id);
        }
    }

    fn saved_file(state: &std::path::Path) -> PathBuf {
        saved::file(state)
    }
}

/// Once, not for each failure in a row.
fn tell_pause(url: &str, pause: Option<Duration>, reason: &dyn std::fmt::Display) {
    if let Some(pause) = pause {
        let pause_ms = pause.as_millis() as u64;
        tracing::info!(peer.url = url, %reason, pause_ms, "a peer failed and is not asked for a while");
    }
}
