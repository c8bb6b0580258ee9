//! Who is there, and how good: a table without I/O, into which sightings and outcomes are told with the time.
//!
//! A peer is known by its instance id, whatever address it is seen at; a host that has none (peernix in Go, a cache
//! that was configured) by where it serves. What its failures cost it is in `peer::blame`; it goes with the peer, to
//! whatever address.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::blame::{Failure, Standing};
use super::greetings::Greetings;
use super::record::{Asking, Peer, PeerId, Place, Source};
use super::wire::Announce;

/// Peers at one address: more are somebody who makes them up.
const MAX_AT_ADDRESS: usize = 16;
/// Bytes from which on a delivery says how fast a peer delivers: fewer take as long as the question.
const MEASURABLE: u64 = 256 * 1024;
/// How much a new measurement counts in a moving average.
const WEIGHT: f64 = 0.2;

/// What a sighting came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// Not known before: it may have what was missed.
    New,
    /// Known.
    Known,
    /// Our own announcement.
    Ourselves,
    /// From a network that is not allowed.
    Refused,
    /// As many as [`Registry::new`] allows are known already, and all of them have answered once.
    Full,
}

/// What an answer of a peer came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// It was left out of what everybody was asked, and is asked from now on: it may have what was missed.
    pub is_new: bool,
    /// It had failed before.
    pub is_back: bool,
}

/// The table.
#[derive(Debug)]
pub struct Registry {
    own_id: String,
    ttl: Duration,
    max_peers: usize,
    peers: HashMap<PeerId, Peer>,
    greetings: Greetings,
}

impl Registry {
    /// An empty table. A peer that is silent for `ttl` is forgotten; beyond `max_peers` none is added.
    #[must_use]
    pub fn new(own_id: String, ttl: Duration, max_peers: usize) -> Self {
        Self { own_id, ttl, max_peers, peers: HashMap::new(), greetings: Greetings::default() }
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
        let mut place = Place { url, address: Some(serves), udp, asking };
        let Some(peer) = self.peers.get_mut(&id) else { return self.add(id, place, source, announce, now) };
        if peer.url == place.url {
            peer.udp = udp.or(peer.udp);
            peer.asking = asking;
        } else {
            let elsewhere = peer.elsewhere.as_ref().filter(|(known, _)| known.url == place.url);
            place.udp = udp.or(elsewhere.and_then(|(known, _)| known.udp));
            // Whoever claims a known id from elsewhere is believed when the place that is known has failed, and one that
            // was taken for that is tried before another is: a host often announces itself from several.
            let has_failed = peer.standing.is_doubtful(now) && !peer.is_untried;
            if !has_failed && peer.source != Source::Saved {
                peer.elsewhere = Some((place, now));
                return Sighting::Known;
            }
            peer.move_to(place);
        }
        // What it did before stays with it: moving must not be a way out of a pause.
        peer.announce = announce;
        peer.last_seen = Some(now);
        peer.standing.seen(now);
        peer.source = if peer.source == Source::Saved { source } else { peer.source };
        Sighting::Known
    }

    /// The configuration names a binary cache.
    pub fn configured(&mut self, url: &str, now: Instant) -> Sighting {
        let url = url.trim_end_matches('/').to_owned();
        let id = PeerId::place(&url);
        let place = Place { url, address: None, udp: None, asking: Asking::Http };
        self.add(id, place, Source::Configured, Announce::default(), now)
    }

    fn add(
        &mut self,
        id: PeerId,
        place: Place,
        source: Source,
        announce: Announce,
        now: Instant,
    ) -> Sighting {
        if self.peers.contains_key(&id) {
            return Sighting::Known;
        }
        // A host that was started again has another id; the one before is nobody any more. What it did stays: a new id
        // costs nothing to make up.
        let mut standing = Standing::default();
        self.peers.retain(|_, peer| {
            let is_before = peer.url == place.url && peer.source != Source::Configured;
            if is_before {
                standing = std::mem::take(&mut peer.standing);
                standing.seen(now);
            }
            !is_before
        });
        if !self.make_room(&place, source) {
            return Sighting::Full;
        }
        let is_hearsay = matches!(source, Source::Configured | Source::Saved);
        let peer = Peer {
            id: id.clone(),
            url: place.url,
            address: place.address,
            udp: place.udp,
            asking: place.asking,
            source,
            announce,
            first_seen: now,
            last_seen: (!is_hearsay).then_some(now),
            standing,
            latency: None,
            bytes_per_second: None,
            in_flight: 0,
            greeted: None,
            elsewhere: None,
            is_untried: false,
        };
        self.peers.insert(id, peer);
        Sighting::New
    }

    /// Makes room for one more, at the cost of whoever never answered: the longest silent of those first. False: all
    /// have proven to be there.
    fn make_room(&mut self, place: &Place, source: Source) -> bool {
        let ip = place.address.map(|address| address.ip());
        let at_address = ip.map_or(0, |ip| self.peers.values().filter(|peer| peer.is_at(ip)).count());
        if at_address >= MAX_AT_ADDRESS {
            return self.evict(source, |peer| ip.is_some_and(|ip| peer.is_at(ip)));
        }
        if self.peers.len() >= self.max_peers && source != Source::Configured {
            return self.evict(source, |_| true);
        }
        true
    }

    fn evict(&mut self, newcomer: Source, among: impl Fn(&Peer) -> bool) -> bool {
        // A file of old times says too little for anybody to have to go.
        if newcomer == Source::Saved {
            return false;
        }
        let may_go =
            |peer: &&Peer| peer.standing.successes == 0 && peer.source != Source::Configured && among(peer);
        let silent = self.peers.values().filter(may_go).min_by_key(|peer| peer.last_seen);
        let Some(id) = silent.map(|peer| peer.id.clone()) else { return false };
        self.peers.remove(&id).is_some()
    }

    /// Whether an announcement of this peer, from this address, is to be answered. Not if one was a moment ago: two hosts
    /// that each answer the other's answers would never end.
    pub fn greet(&mut self, id: &PeerId, from: IpAddr, pause: Duration, now: Instant) -> bool {
        let Some(peer) = self.peers.get_mut(id) else { return false };
        let is_due = peer.greeted.is_none_or(|at| now.saturating_duration_since(at) >= pause);
        let greet = is_due && self.greetings.allow(from, pause, now);
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

    /// Nobody is this any more. True: it was known.
    pub fn forget(&mut self, id: &PeerId) -> bool {
        self.peers.remove(id).is_some()
    }

    /// Whether a peer that is known is at this address.
    #[must_use]
    pub fn knows(&self, address: IpAddr) -> bool {
        self.peers.values().any(|peer| peer.is_at(address))
    }

    /// Whether somebody is not asked for now who may have anything: after failures, or before its first check. Who never
    /// once answered does not count, or made-up peers could keep misses from being remembered.
    #[must_use]
    pub fn leaves_out_somebody(&self, now: Instant) -> bool {
        self.peers.values().any(|peer| !peer.may_be_asked(now) && !peer.standing.never_answered())
    }

    /// The peers that may be asked now and are `wanted`, the best first.
    #[must_use]
    pub fn candidates(&self, now: Instant, mut wanted: impl FnMut(&PeerId) -> bool) -> Vec<Peer> {
        let may_be_asked = self.peers.values().filter(|peer| peer.may_be_asked(now));
        let mut fit: Vec<&Peer> = may_be_asked.filter(|peer| wanted(&peer.id)).collect();
        let cost = |peer: &Peer| (!peer.is_proven(), peer.in_flight, peer.latency.unwrap_or_default());
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

    /// Those at this address.
    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = &Peer> {
        self.peers.values().filter(move |peer| peer.is_at(address))
    }

    /// All peers, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values()
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

    /// It answered as it should, after this time.
    pub fn succeeded(&mut self, id: &PeerId, latency: Duration, now: Instant) -> Answered {
        let Some(peer) = self.peers.get_mut(id) else { return Answered::default() };
        let was_left_out = peer.source == Source::Saved || peer.standing.never_answered();
        if peer.source == Source::Saved {
            peer.source = Source::Announced;
        }
        peer.last_seen = Some(now);
        peer.is_untried = false;
        let before = peer.latency.unwrap_or(latency);
        peer.latency = Some(before.mul_f64(1.0 - WEIGHT) + latency.mul_f64(WEIGHT));
        Answered { is_new: was_left_out, is_back: peer.standing.answered() }
    }

    /// It delivered so many bytes in this time, and they have proven right.
    pub fn delivered(&mut self, id: &PeerId, bytes: u64, took: Duration) {
        if let Some(peer) = self.peers.get_mut(id) {
            if bytes >= MEASURABLE {
                let measured = bytes as f64 / took.as_secs_f64().max(1e-6);
                let before = peer.bytes_per_second.unwrap_or(measured);
                peer.bytes_per_second = Some(before * (1.0 - WEIGHT) + measured * WEIGHT);
            }
            peer.standing.proved_right();
        }
    }

    /// A request to it that began then failed: it is not asked for a while, and elsewhere after that if it announced itself
    /// there too. Gives that while if it was doing well before.
    pub fn failed(
        &mut self,
        id: &PeerId,
        failure: Failure,
        began: Instant,
        now: Instant,
    ) -> Option<Duration> {
        let ttl = self.ttl;
        let peer = self.peers.get_mut(id)?;
        let before = peer.standing.failures_in_a_row;
        let pause = peer.standing.failed(failure, began, now);
        // Requests that fail together count once, and move it once.
        if peer.standing.failures_in_a_row > before {
            peer.is_untried = false;
            let is_there = |seen: &Instant| now.saturating_duration_since(*seen) < ttl;
            let elsewhere =
                peer.elsewhere.take_if(|(_, seen)| failure == Failure::NoAnswer && is_there(seen));
            if let Some((place, _)) = elsewhere {
                peer.move_to(place);
            }
        }
        pause
    }

    /// Peers that were silent for at least `silence`, or are only known from before the last restart, and are not paused:
    /// a health check is due.
    #[must_use]
    pub fn silent(&self, silence: Duration, now: Instant) -> Vec<Peer> {
        let is_silent = |peer: &&Peer| peer.source == Source::Saved || peer.silence(now) >= silence;
        self.peers.values().filter(is_silent).filter(|peer| !peer.is_paused(now)).cloned().collect()
    }

    /// Forgets whoever was silent for the TTL, and says who. Configured ones stay.
    pub fn expire(&mut self, now: Instant) -> Vec<PeerId> {
        let ttl = self.ttl;
        let gone = |peer: &Peer| peer.source != Source::Configured && peer.silence(now) >= ttl;
        let ids: Vec<PeerId> =
            self.peers.values().filter(|peer| gone(peer)).map(|peer| peer.id.clone()).collect();
        self.peers.retain(|_, peer| !gone(peer));
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::super::blame::{LONGEST_PAUSE, PAUSE_WHEN_SEEN};
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
        let mut at = now;
        for _ in 0..8 {
            at += LONGEST_PAUSE;
            registry.failed(&id, Failure::NoAnswer, at, at);
        }
        assert!(registry.candidates(at, |_| true).is_empty());
        seen(&mut registry, Some("a"), 1, "10.0.7.1:9999", at);
        assert_eq!(registry.get(&id).unwrap().url, "http://10.0.7.1:1/nix-cache");
        assert_eq!(registry.get(&id).unwrap().standing.failures_in_a_row, 8);
        assert_eq!(registry.candidates(at + PAUSE_WHEN_SEEN, |_| true).len(), 1);
    }

    #[test]
    fn a_host_that_announces_itself_from_several_addresses_is_asked_where_it_answers() {
        let (mut registry, mut now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        let id = PeerId::instance("a");
        let (works, fails) = ("http://10.0.0.1:1/nix-cache", "http://[fe80::1]:1/nix-cache");
        for first in ["[fe80::1]:9999", "10.0.0.1:9999"] {
            registry = Registry::new("me".to_owned(), TTL, 10);
            seen(&mut registry, Some("a"), 1, first, now);
            for _ in 0..20 {
                now += Duration::from_secs(10);
                // Whatever is heard last, and however many requests fail together.
                seen(&mut registry, Some("a"), 1, "10.0.0.1:9999", now);
                seen(&mut registry, Some("a"), 1, "[fe80::1]:9999", now);
                for _ in 0..3 {
                    if registry.get(&id).unwrap().url == fails {
                        registry.failed(&id, Failure::NoAnswer, now, now);
                    } else {
                        registry.succeeded(&id, Duration::ZERO, now);
                    }
                }
            }
            let peer = registry.get(&id).unwrap();
            assert_eq!((&*peer.url, peer.standing.failures_in_a_row), (works, 0), "{first}");
            assert!(peer.standing.failures <= 1, "{first}: {peer:?}");
            assert_eq!(peer.datagrams().count(), 2);
        }
        // The one that worked goes, and the other is there.
        registry.failed(&id, Failure::NoAnswer, now, now);
        assert_eq!(registry.get(&id).unwrap().url, fails);
        // Where it was not heard of for the TTL it is not looked for.
        registry.failed(&id, Failure::NoAnswer, now + TTL, now + TTL);
        assert_eq!(registry.get(&id).unwrap().url, fails);
    }

    #[test]
    fn neither_another_address_nor_another_id_ends_the_pause_of_a_liar() {
        let (mut registry, mut now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        let (mut pauses, mut id) = (Vec::new(), "0".to_owned());
        seen(&mut registry, Some(&id), 1, "10.0.0.1:9999", now);
        for round in 1..=8_u16 {
            let known = registry.all()[0].id.clone();
            registry.succeeded(&known, Duration::ZERO, now);
            registry.failed(&known, Failure::Lie, now, now);
            let began = now;
            // The same id at another port, and another id at the same port, in turn.
            if round % 2 == 0 {
                id = round.to_string();
            }
            let port = 1 + round.div_ceil(2);
            assert_eq!(registry.candidates(now, |_| true).len(), 0);
            seen(&mut registry, Some(&id), port, "10.0.0.1:9999", now);
            assert_eq!(registry.len(), 1, "{:?}", registry.all());
            while registry.candidates(now, |_| true).is_empty() {
                now += Duration::from_millis(100);
                seen(&mut registry, Some(&id), port, "10.0.0.1:9999", now);
            }
            pauses.push(now - began);
        }
        assert!(pauses.windows(2).all(|two| two[0] < two[1] || two[1] == LONGEST_PAUSE), "{pauses:?}");
        assert_eq!(pauses.last(), Some(&LONGEST_PAUSE));
    }

    #[test]
    fn who_never_answered_makes_room_and_who_did_stays() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 3), Instant::now());
        registry.configured("http://cache:5000", now);
        let second = Duration::from_secs(1);
        seen(&mut registry, Some("a"), 1, "10.0.0.1:9999", now);
        seen(&mut registry, Some("b"), 1, "10.0.0.2:9999", now + second);
        // The longest silent goes first, and the configured never.
        assert_eq!(seen(&mut registry, Some("c"), 1, "10.0.0.3:9999", now + second), Sighting::New);
        assert!(registry.get(&PeerId::instance("a")).is_none());
        let saved = registry.announced(announce(Some("d"), 1), at("10.0.0.4:1"), Source::Saved, now + second);
        assert_eq!(saved, Sighting::Full, "a file's word against somebody's own");
        for id in ["b", "c"] {
            registry.succeeded(&PeerId::instance(id), Duration::ZERO, now + second);
        }
        assert_eq!(seen(&mut registry, Some("d"), 1, "10.0.0.4:9999", now + 2 * second), Sighting::Full);
        assert_eq!(registry.len(), 3);
    }

    #[test]
    fn only_who_answered_once_or_was_not_tried_yet_holds_up_a_miss() {
        let (mut registry, now) = (Registry::new("me".to_owned(), TTL, 10), Instant::now());
        let id = PeerId::instance("a");
        registry.announced(announce(Some("a"), 1), at("10.0.0.1:1"), Source::Saved, now);
        assert!(registry.get(&id).unwrap().last_seen.is_none());
        assert!(registry.leaves_out_somebody(now), "not checked yet");
        assert!(registry.failed(&id, Failure::NoAnswer, now, now).is_some());
        assert!(!registry.leaves_out_somebody(now), "checked in vain");
        seen(&mut registry, Some("a"), 1, "10.0.0.1:9999", now);
        assert!(!registry.leaves_out_somebody(now), "announced, and still never heard");
        let answered = registry.succeeded(&id, Duration::ZERO, now);
        assert_eq!(answered, Answered { is_new: true, is_back: true });
        assert_eq!(registry.succeeded(&id, Duration::ZERO, now), Answered::default());
        registry.failed(&id, Failure::NoAnswer, now, now);
        assert!(registry.leaves_out_somebody(now), "it may come back");
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
            [("a", 1, Sighting::New), ("b", 9, Sighting::New), ("c", 3, Sighting::Full)]
        {
            assert_eq!(seen(&mut registry, Some(id), port, "10.0.0.1:9999", now), sighting);
            registry.succeeded(&PeerId::instance(id), Duration::from_millis(port.into()), now);
        }
        let (a, b) = (PeerId::instance("a"), PeerId::instance("b"));
        assert_eq!(registry.candidates(now, |_| true)[0].id, a);
        registry.began(&a);
        assert_eq!(registry.candidates(now, |_| true)[0].id, b);
        registry.ended(&a);
        // A newcomer before whoever is known to be good would cost every question something if it is silent.
        let (mut registry, second) = (Registry::new("me".to_owned(), TTL, 100), Duration::from_secs(1));
        seen(&mut registry, Some("a"), 1, "10.0.0.1:9999", now);
        registry.succeeded(&a, Duration::from_millis(5), now);
        for number in 0..40 {
            let from = format!("10.0.1.{number}:9999");
            seen(&mut registry, Some(&format!("new{number}")), 1, &from, now + second);
        }
        registry.began(&a);
        assert_eq!(registry.candidates(now + second, |_| true)[0].id, a);
        registry.delivered(&a, 1000, Duration::from_secs(1));
        assert_eq!(registry.get(&a).unwrap().bytes_per_second, None, "too little to measure");
        registry.delivered(&a, 1_000_000, Duration::from_secs(1));
        assert_eq!(registry.get(&a).unwrap().bytes_per_second, Some(1e6));
    }
}
