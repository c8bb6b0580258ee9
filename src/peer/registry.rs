//! Who is there, and how good: a table without I/O, into which sightings and outcomes are told with the time.
//!
//! A peer is known by its instance id, whatever address it is seen at; a host that has none (peernix in Go, a cache
//! that was configured) by where it serves. Wrong and slow peers cost themselves: each failure in a row doubles
//! the time for which they are not asked.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::wire::Announce;

/// The first pause after a failure; it doubles with each one in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Peers at one address: more are somebody who makes them up.
const MAX_AT_ADDRESS: usize = 16;
/// How much a new measurement counts in a moving average.
const WEIGHT: f64 = 0.2;

/// Who a peer is, apart from where it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(String);

impl PeerId {
    /// The peer with this instance id.
    #[must_use]
    pub fn instance(id: &str) -> Self {
        Self(id.to_owned())
    }

    /// The host that is known by where it serves alone.
    #[must_use]
    pub fn place(place: impl fmt::Display) -> Self {
        Self(place.to_string())
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a peer was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// By its announcement.
    Announced,
    /// By multicast DNS.
    Mdns,
    /// By the configuration: it is never removed.
    Configured,
    /// From the file of peers that were known before the last restart.
    Saved,
}

/// How a peer is asked whether it has a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// By a request for the narinfo; it answers from its own store alone.
    Http,
    /// By a datagram first: peernix in Go would ask the whole LAN itself if it were asked by HTTP.
    Datagram(SocketAddr),
}

/// What is known of a peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Who.
    pub id: PeerId,
    /// Its binary cache, without a slash at the end.
    pub url: String,
    /// Where that is, unless only the configuration's URL is known.
    pub address: Option<SocketAddr>,
    /// Where its datagrams come from, if any did.
    pub udp: Option<SocketAddr>,
    /// How it is asked.
    pub asking: Asking,
    /// How it was found.
    pub source: Source,
    /// What it said of itself last.
    pub announce: Announce,
    /// When it was seen first and last.
    pub first_seen: Instant,
    /// When it answered or announced itself last.
    pub last_seen: Instant,
    /// Failures in a row, and ever.
    pub failures_in_a_row: u32,
    /// Failures since it is known.
    pub failures: u64,
    /// Good answers since it is known.
    pub successes: u64,
    /// Moving average of the time to an answer.
    pub latency: Option<Duration>,
    /// Moving average of what it delivers, in bytes a second.
    pub bytes_per_second: Option<f64>,
    /// Requests to it that are under way.
    pub in_flight: u32,
    /// Not asked before then.
    paused_until: Option<Instant>,
    /// When its announcement was answered last.
    greeted: Option<Instant>,
    /// When a failure was counted last.
    failed_last: Option<Instant>,
}

/// What a sighting came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// Not known before: it may have what was missed.
    New,
    /// Known.
    Known,
    /// Our own announcement.
    Ourselves,
    /// As many as [`Registry::new`] allows are known already.
    Full,
}

/// Where and how a new peer is reached.
struct Place {
    url: String,
    address: Option<SocketAddr>,
    udp: Option<SocketAddr>,
    asking: Asking,
    source: Source,
}

/// The table.
#[derive(Debug)]
pub struct Registry {
    own_id: String,
    ttl: Duration,
    max_peers: usize,
    peers: HashMap<PeerId, Peer>,
}

impl Registry {
    /// An empty table. A peer that is silent for `ttl` is forgotten; beyond `max_peers` none is added.
    #[must_use]
    pub fn new(own_id: String, ttl: Duration, max_peers: usize) -> Self {
        Self { own_id, ttl, max_peers, peers: HashMap::new() }
    }

    /// A host announced itself, from this address.
    pub fn announced(
        &mut self,
        announce: Announce,
        from: SocketAddr,
        source: Source,
        now: Instant,
    ) -> Sighting {
        if announce.id.as_ref() == Some(&self.own_id) {
            return Sighting::Ourselves;
        }
        let mut serves = SocketAddr::new(from.ip().to_canonical(), announce.port);
        if let (SocketAddr::V6(from), SocketAddr::V6(serves)) = (from, &mut serves) {
            // A link-local address means nothing without its interface.
            serves.set_scope_id(from.scope_id());
        }
        let url = format!("http://{serves}/nix-cache");
        let (id, asking) = match &announce.id {
            Some(id) => (PeerId::instance(id), Asking::Http),
            // The questions go where its announcements come from.
            None => (PeerId::place(serves), Asking::Datagram(from)),
        };
        let udp = (source == Source::Announced).then_some(from);
        if let Some(peer) = self.peers.get_mut(&id) {
            // Whoever claims a known id from elsewhere is believed when the place that is known has failed.
            if peer.url == url || peer.failures_in_a_row > 0 || peer.source == Source::Saved {
                if peer.url != url {
                    peer.paused_until = None;
                    peer.failures_in_a_row = 0;
                }
                peer.url = url;
                peer.address = Some(serves);
                peer.udp = udp.or(peer.udp);
                peer.asking = asking;
                peer.announce = announce;
                peer.last_seen = now;
                // It is there, whatever failed: it is tried again soon.
                peer.paused_until = peer.paused_until.map(|until| until.min(now + 4 * FIRST_PAUSE));
                peer.source = if peer.source == Source::Saved { source } else { peer.source };
            }
            return Sighting::Known;
        }
        self.add(id, Place { url, address: Some(serves), udp, asking, source }, announce, now)
    }

    /// The configuration names a binary cache.
    pub fn configured(&mut self, url: &str, now: Instant) -> Sighting {
        let url = url.trim_end_matches('/').to_owned();
        let id = PeerId::place(&url);
        let place = Place { url, address: None, udp: None, asking: Asking::Http, source: Source::Configured };
        self.add(id, place, Announce::default(), now)
    }

    fn add(&mut self, id: PeerId, place: Place, announce: Announce, now: Instant) -> Sighting {
        if self.peers.contains_key(&id) {
            return Sighting::Known;
        }
        // A host that was started again has another id; the one before is nobody any more.
        self.peers.retain(|_, peer| peer.url != place.url || peer.source == Source::Configured);
        let at_address = |ip: IpAddr| self.peers.values().filter(|peer| peer.is_at(ip)).count();
        if place.address.is_some_and(|address| at_address(address.ip()) >= MAX_AT_ADDRESS) {
            return Sighting::Full;
        }
        if self.peers.len() >= self.max_peers && place.source != Source::Configured {
            return Sighting::Full;
        }
        let peer = Peer {
            id: id.clone(),
            url: place.url,
            address: place.address,
            udp: place.udp,
            asking: place.asking,
            source: place.source,
            announce,
            first_seen: now,
            last_seen: now,
            failures_in_a_row: 0,
            failures: 0,
            successes: 0,
            latency: None,
            bytes_per_second: None,
            in_flight: 0,
            paused_until: None,
            greeted: None,
            failed_last: None,
        };
        self.peers.insert(id, peer);
        Sighting::New
    }

    /// Whether an announcement of this peer is to be answered. Not if one was a moment ago: two hosts that each answer
    /// the other's answers would never end.
    pub fn greet(&mut self, id: &PeerId, pause: Duration, now: Instant) -> bool {
        let Some(peer) = self.peers.get_mut(id) else { return false };
        let greet = peer.greeted.is_none_or(|at| now.saturating_duration_since(at) >= pause);
        if greet {
            peer.greeted = Some(now);
        }
        greet
    }

    /// A host said from this address that it stops. True: it was known there.
    pub fn goodbye(&mut self, id: &str, from: IpAddr) -> bool {
        let id = PeerId::instance(id);
        // Ids are no secret: only the host itself can say that it stops.
        let is_itself = self.peers.get(&id).is_some_and(|peer| peer.is_at(from));
        is_itself && self.peers.remove(&id).is_some()
    }

    /// Whether a peer that is known is at this address.
    #[must_use]
    pub fn knows(&self, address: IpAddr) -> bool {
        self.peers.values().any(|peer| peer.is_at(address))
    }

    /// Whether somebody is not asked for now who may have anything: after failures, or before its first check.
    #[must_use]
    pub fn leaves_out_somebody(&self, now: Instant) -> bool {
        self.peers.values().any(|peer| !peer.may_be_asked(now))
    }

    /// The peers that may be asked now, the best first.
    #[must_use]
    pub fn candidates(&self, now: Instant) -> Vec<Peer> {
        let mut fit: Vec<&Peer> = self.peers.values().filter(|peer| peer.may_be_asked(now)).collect();
        let cost = |peer: &Peer| (peer.in_flight, peer.latency.unwrap_or(Duration::from_millis(1)));
        fit.sort_by_key(|peer| cost(peer));
        fit.into_iter().cloned().collect()
    }

    /// How many peers are known, asked now or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    /// Whether nobody is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    /// One peer.
    #[must_use]
    pub fn get(&self, id: &PeerId) -> Option<&Peer> {
        self.peers.get(id)
    }

    /// All peers, in the order of their ids.
    #[must_use]
    pub fn all(&self) -> Vec<Peer> {
        let mut all: Vec<Peer> = self.peers.values().cloned().collect();
        all.sort_by(|one, other| one.id.cmp(&other.id));
        all
    }

    /// A request to a peer begins.
    pub fn began(&mut self, id: &PeerId) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.in_flight += 1;
        }
    }

    /// A request to a peer came to an end, whatever that was.
    pub fn ended(&mut self, id: &PeerId) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.in_flight = peer.in_flight.saturating_sub(1);
        }
    }

    /// It answered as it should, after this time. True: that was the first check of a saved one.
    pub fn succeeded(&mut self, id: &PeerId, latency: Duration, now: Instant) -> bool {
        let mut was_saved = false;
        if let Some(peer) = self.peers.get_mut(id) {
            peer.successes += 1;
            if peer.source == Source::Saved {
                peer.source = Source::Announced;
                was_saved = true;
            }
            peer.failures_in_a_row = 0;
            peer.paused_until = None;
            peer.last_seen = now;
            let before = peer.latency.unwrap_or(latency);
            peer.latency = Some(before.mul_f64(1.0 - WEIGHT) + latency.mul_f64(WEIGHT));
        }
        was_saved
    }

    /// It delivered so many bytes in this time.
    pub fn delivered(&mut self, id: &PeerId, bytes: u64, took: Duration) {
        if let Some(peer) = self.peers.get_mut(id) {
            let measured = bytes as f64 / took.as_secs_f64().max(1e-6);
            let before = peer.bytes_per_second.unwrap_or(measured);
            peer.bytes_per_second = Some(before * (1.0 - WEIGHT) + measured * WEIGHT);
        }
    }

    /// A request to it that began then failed, or proved it a liar: it is not asked for a while. Requests that were under way
    /// together fail together, and count as one.
    pub fn failed(&mut self, id: &PeerId, began: Instant, now: Instant) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.failures += 1;
            if peer.failed_last.replace(now).is_some_and(|last| began < last) {
                return;
            }
            peer.failures_in_a_row = peer.failures_in_a_row.saturating_add(1);
            let doublings = (peer.failures_in_a_row - 1).min(16);
            let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
            peer.paused_until = Some(now + pause);
        }
    }

    /// Peers that were silent for at least `silence`, or are only known from before the last restart, and are not paused:
    /// a health check is due.
    #[must_use]
    pub fn silent(&self, silence: Duration, now: Instant) -> Vec<Peer> {
        let is_silent = |peer: &&Peer| {
            peer.source == Source::Saved || now.saturating_duration_since(peer.last_seen) >= silence
        };
        self.peers.values().filter(is_silent).filter(|peer| !peer.is_paused(now)).cloned().collect()
    }

    /// Forgets whoever was silent for the TTL, and says who. Configured ones stay.
    pub fn expire(&mut self, now: Instant) -> Vec<PeerId> {
        let ttl = self.ttl;
        let gone = |peer: &Peer| {
            peer.source != Source::Configured && now.saturating_duration_since(peer.last_seen) >= ttl
        };
        let ids: Vec<PeerId> =
            self.peers.values().filter(|peer| gone(peer)).map(|peer| peer.id.clone()).collect();
        self.peers.retain(|_, peer| !gone(peer));
        ids
    }
}

impl Peer {
    fn is_at(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.address.iter().chain(&self.udp).any(|known| known.ip().to_canonical() == address)
    }

    /// Whether it is asked for paths: not paused, and not only known from before the last restart.
    #[must_use]
    pub fn may_be_asked(&self, now: Instant) -> bool {
        !self.is_paused(now) && self.source != Source::Saved
    }

    /// Whether it failed so lately that it is not asked.
    #[must_use]
    pub fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);

    fn announce(id: Option<&str>, port: u16) -> Announce {
        Announce { id: id.map(str::to_owned), port, ..Announce::default() }
    }

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    fn seen(registry: &mut Registry, id: Option<&str>, port: u16, from: &str, now: Instant) -> Sighting {
        registry.announced(announce(id, port), at(from), Source::Announced, now)
    }

    #[test]
    fn a_peer_is_its_id_and_the_announced_port_counts() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        assert_eq!(seen(&mut registry, Some("a"), 8080, "10.0.0.1:9999", now), Sighting::New);
        // The same host over another interface.
        assert_eq!(seen(&mut registry, Some("a"), 8080, "192.168.0.1:9999", now), Sighting::Known);
        assert_eq!(registry.len(), 1);
        assert_eq!(registry.all()[0].url, "http://10.0.0.1:8080/nix-cache");
        assert_eq!(seen(&mut registry, Some("me"), 8080, "10.0.0.9:9999", now), Sighting::Ourselves);
        // Two of the old kind behind one address, told apart by their ports.
        assert_eq!(seen(&mut registry, None, 1, "10.0.0.2:9999", now), Sighting::New);
        assert_eq!(seen(&mut registry, None, 2, "[::ffff:10.0.0.2]:9999", now), Sighting::New);
        assert_eq!(seen(&mut registry, None, 2, "10.0.0.2:9999", now), Sighting::Known);
        assert_eq!(registry.len(), 3);
    }

    #[test]
    fn a_host_that_was_started_again_takes_the_place_of_what_it_was() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        seen(&mut registry, Some("before"), 1, "10.0.0.1:9999", now);
        assert_eq!(seen(&mut registry, Some("after"), 1, "10.0.0.1:9999", now), Sighting::New);
        assert_eq!(registry.all().iter().map(|peer| peer.id.to_string()).collect::<Vec<_>>(), ["after"]);
    }

    #[test]
    fn one_address_cannot_fill_the_table() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 1000), Instant::now());
        for port in 1..200 {
            seen(&mut registry, Some(&format!("{port}")), port, "10.0.0.1:9999", now);
        }
        assert_eq!(registry.len(), MAX_AT_ADDRESS);
        assert_eq!(seen(&mut registry, Some("other"), 1, "10.0.0.2:9999", now), Sighting::New);
    }

    #[test]
    fn an_id_moves_only_when_its_place_has_failed() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        let id = PeerId::instance("a");
        seen(&mut registry, Some("a"), 1, "10.0.0.1:9999", now);
        seen(&mut registry, Some("a"), 1, "10.6.6.6:9999", now);
        assert_eq!(registry.get(&id).unwrap().url, "http://10.0.0.1:1/nix-cache");
        registry.failed(&id, now, now);
        assert!(registry.candidates(now).is_empty());
        seen(&mut registry, Some("a"), 1, "10.0.7.1:9999", now);
        assert_eq!(registry.get(&id).unwrap().url, "http://10.0.7.1:1/nix-cache");
        assert_eq!(registry.candidates(now).len(), 1);
    }

    #[test]
    fn failures_pause_longer_and_longer_and_a_success_ends_that() {
        let (mut registry, mut now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        let id = PeerId::instance("a");
        seen(&mut registry, Some("a"), 1, "10.0.0.1:9999", now);
        let mut pauses = Vec::new();
        for _ in 0..12 {
            registry.failed(&id, now, now);
            let began = now;
            while registry.get(&id).unwrap().is_paused(now) {
                now += Duration::from_millis(100);
            }
            pauses.push(now - began);
        }
        assert!(pauses.windows(2).all(|two| two[0] <= two[1]), "{pauses:?}");
        assert_eq!((pauses[0], *pauses.last().unwrap()), (FIRST_PAUSE, LONGEST_PAUSE));
        registry.failed(&id, now, now);
        registry.succeeded(&id, Duration::from_millis(2), now);
        assert_eq!(registry.candidates(now).len(), 1);
    }

    #[test]
    fn the_silent_are_checked_then_forgotten_and_the_configured_stay() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        seen(&mut registry, Some("a"), 1, "10.0.0.1:9999", now);
        registry.configured("http://cache:5000/", now);
        let later = now + TTL / 2;
        assert_eq!(registry.silent(TTL / 2, later).len(), 2);
        registry.succeeded(&PeerId::instance("a"), Duration::ZERO, later);
        assert_eq!(registry.silent(TTL / 2, later).len(), 1);
        assert!(registry.expire(now + TTL).is_empty());
        assert_eq!(registry.expire(later + TTL), [PeerId::instance("a")]);
        assert_eq!(registry.all()[0].url, "http://cache:5000");
        seen(&mut registry, Some("b"), 1, "10.0.0.1:9999", now);
        assert!(!registry.goodbye("b", at("10.6.6.6:1").ip()), "a goodbye in another's name");
        assert!(registry.goodbye("b", at("10.0.0.1:1").ip()));
    }

    #[test]
    fn the_table_is_bounded_and_the_less_busy_are_asked_first() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 2), Instant::now());
        for (id, port, sighting) in
            [("a", 1, Sighting::New), ("b", 2, Sighting::New), ("c", 3, Sighting::Full)]
        {
            assert_eq!(seen(&mut registry, Some(id), port, "10.0.0.1:9999", now), sighting);
        }
        let (a, b) = (PeerId::instance("a"), PeerId::instance("b"));
        registry.succeeded(&a, Duration::from_millis(1), now);
        registry.succeeded(&b, Duration::from_millis(9), now);
        assert_eq!(registry.candidates(now)[0].id, a);
        registry.began(&a);
        assert_eq!(registry.candidates(now)[0].id, b);
        registry.ended(&a);
        registry.delivered(&a, 1_000_000, Duration::from_secs(1));
        assert_eq!(registry.get(&a).unwrap().bytes_per_second, Some(1e6));
    }
}
