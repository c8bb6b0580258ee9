//! `/api/v1/…`: who is there and how it goes, as JSON.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::nix::signature::public_key_text;
use crate::resolve::{Peer, Resolver, StoreState};

/// One peer, as `/api/v1/peers` tells it.
#[derive(Debug, Serialize)]
struct PeerReport {
    id: String,
    url: String,
    source: crate::resolve::Source,
    peernix_version: String,
    nix_version: String,
    platform: String,
    features: Vec<String>,
    /// Shown, never trusted for being announced.
    public_key: String,
    /// Whether this host trusts that key, or one of them: otherwise nothing that was built there is copied. `null` for one
    /// that announces no key.
    public_key_is_trusted: Option<bool>,
    known_for_seconds: u64,
    /// `null` for one that was never heard of.
    last_seen_seconds_ago: Option<f64>,
    successes: u64,
    failures: u64,
    failures_in_a_row: u32,
    /// Not asked for now, after failures.
    paused: bool,
    in_flight: u32,
    latency_ms: Option<f64>,
    bytes_per_second: Option<f64>,
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    instance_id: String,
    uptime_seconds: u64,
    store: String,
    /// As they stand in nix.conf, each by itself.
    public_keys: Vec<String>,
    trusted_keys: Vec<String>,
    peers: usize,
    remembered_misses: u64,
}

/// All peers.
pub(super) fn peers(resolver: &Resolver) -> String {
    let now = Instant::now();
    let reports: Vec<PeerReport> =
        resolver.peers().all().into_iter().map(|peer| report(peer, resolver, now)).collect();
    to_json(&reports)
}

/// How it goes.
pub(super) fn status(resolver: &Resolver, uptime: Duration) -> String {
    to_json(&Status {
        version: env!("CARGO_PKG_VERSION"),
        instance_id: resolver.peers().own_id().to_owned(),
        uptime_seconds: uptime.as_secs(),
        store: health(resolver).1,
        public_keys: resolver.signer().public_keys().iter().map(public_key_text).collect(),
        trusted_keys: resolver.trust().key_names(),
        peers: resolver.peers().len(),
        remembered_misses: resolver.remembered_misses(),
    })
}

/// How this host is, in a word, and its store, with the reason where it is bad.
pub(super) fn health(resolver: &Resolver) -> (&'static str, String) {
    match &*resolver.store().state().borrow() {
        StoreState::Starting => ("starting", "starting".to_owned()),
        StoreState::Unavailable(error) => ("degraded", format!("unavailable: {error}")),
        // Asked of a folder that is not there, nix-store says of every path that it is not valid.
        StoreState::Serving if !resolver.store().is_there() => {
            ("degraded", "unavailable: the store directory does not exist".to_owned())
        }
        StoreState::Serving => ("ok", "serving".to_owned()),
    }
}

fn report(peer: Peer, resolver: &Resolver, now: Instant) -> PeerReport {
    let key = &peer.announce.public_key;
    PeerReport {
        public_key_is_trusted: (!key.is_empty()).then(|| resolver.trust().trusts_any(key)),
        paused: peer.is_paused(now),
        id: peer.id.to_string(),
        url: peer.url,
        source: peer.source,
        peernix_version: peer.announce.peernix_version,
        nix_version: peer.announce.nix_version,
        platform: peer.announce.platform,
        features: peer.announce.features,
        public_key: peer.announce.public_key,
        known_for_seconds: now.saturating_duration_since(peer.first_seen).as_secs(),
        last_seen_seconds_ago: peer.last_seen.map(|seen| now.saturating_duration_since(seen).as_secs_f64()),
        successes: peer.standing.successes,
        failures: peer.standing.failures,
        failures_in_a_row: peer.standing.failures_in_a_row,
        in_flight: peer.in_flight,
        latency_ms: peer.latency.map(|latency| latency.as_secs_f64() * 1e3),
        bytes_per_second: peer.bytes_per_second,
    }
}

fn to_json(value: &impl Serialize) -> String {
    // Nothing in these types can fail to be written; an empty page would be the worst of it.
    serde_json::to_string_pretty(value).map(|json| json + "\n").unwrap_or_default()
}
