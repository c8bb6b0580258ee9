//! What discovery, the ways to peers, and lookups on the LAN count.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// How a request to a peer can end: as `peer` counts it.
const REQUEST_OUTCOMES: [&str; 4] = ["ok", "unreachable", "wrong", "not_made"];
/// How a lookup can end: as `resolve` counts it.
const LOOKUP_OUTCOMES: [&str; 4] = ["found", "missing", "unknown", "remembered_miss"];
/// Whether a datagram was understood.
const DATAGRAM_OUTCOMES: [&str; 2] = ["understood", "strange"];

/// Counters that stand at 0 from the start: a series that begins with its first event has no rate over it.
fn at_zero(outcomes: &[&'static str]) -> Family<OutcomeLabel, Counter> {
    let family = Family::default();
    for &outcome in outcomes {
        let _ = family.get_or_create(&OutcomeLabel { outcome });
    }
    family
}

/// What discovery and the ways to peers count.
#[derive(Clone, Debug)]
pub struct PeerMetrics {
    /// Peers that are known now.
    pub known: Gauge,
    /// Datagrams that were sent.
    pub datagrams_sent: Counter,
    /// Bytes of NARs that came from peers and were verified.
    pub relayed_bytes: Counter,
    /// Bytes of NARs as they came from peers, packed or not.
    pub wire_bytes: Counter,
    /// Claims of peers that proved wrong.
    pub lies: Counter,
    /// Peers of which it is known now what they hold.
    pub holdings_known: Gauge,
    /// Bytes in which peers told what they hold.
    pub holdings_bytes: Counter,
    /// Questions that were not asked since the peer does not have the path.
    pub not_asked: Counter,
    received: Family<OutcomeLabel, Counter>,
    requests: Family<OutcomeLabel, Counter>,
    seconds: Histogram,
}

impl Default for PeerMetrics {
    fn default() -> Self {
        Self {
            known: Gauge::default(),
            datagrams_sent: Counter::default(),
            relayed_bytes: Counter::default(),
            wire_bytes: Counter::default(),
            lies: Counter::default(),
            holdings_known: Gauge::default(),
            holdings_bytes: Counter::default(),
            not_asked: Counter::default(),
            received: at_zero(&DATAGRAM_OUTCOMES),
            requests: at_zero(&REQUEST_OUTCOMES),
            seconds: super::http::request_seconds(),
        }
    }
}

impl PeerMetrics {
    /// A datagram came in, and was understood or not.
    pub fn datagram_received(&self, understood: bool) {
        let outcome = if understood { "understood" } else { "strange" };
        self.received.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// A request to a peer came to its end.
    pub fn request(&self, outcome: &'static str, seconds: f64) {
        self.requests.get_or_create(&OutcomeLabel { outcome }).inc();
        self.seconds.observe(seconds);
    }
}

/// What lookups on the LAN count.
#[derive(Clone, Debug)]
pub struct LookupMetrics {
    outcomes: Family<OutcomeLabel, Counter>,
    seconds: Histogram,
    /// Requests that joined a lookup that was under way.
    pub joined: Counter,
    /// Narinfos of peers that no trusted key has signed.
    pub untrusted: Counter,
    /// Misses that are remembered now, about.
    pub remembered_misses: Gauge,
}

impl Default for LookupMetrics {
    fn default() -> Self {
        Self {
            outcomes: at_zero(&LOOKUP_OUTCOMES),
            seconds: super::http::request_seconds(),
            joined: Counter::default(),
            untrusted: Counter::default(),
            remembered_misses: Gauge::default(),
        }
    }
}

impl LookupMetrics {
    /// A lookup came to its end.
    pub fn outcome(&self, outcome: &'static str, seconds: f64) {
        self.outcomes.get_or_create(&OutcomeLabel { outcome }).inc();
        self.seconds.observe(seconds);
    }
}

pub(super) fn register(registry: &mut Registry, peers: &PeerMetrics, lookups: &LookupMetrics) {
    registry.register("peers", "Peers that are known", peers.known.clone());
    let help = "Datagrams that were sent for discovery";
    registry.register("discovery_datagrams_sent", help, peers.datagrams_sent.clone());
    let help = "Datagrams that were received, and whether they were understood";
    registry.register("discovery_datagrams_received", help, peers.received.clone());
    registry.register("peer_requests", "Requests to peers, by outcome", peers.requests.clone());
    registry.register("peer_request_seconds", "Seconds to a peer's answer", peers.seconds.clone());
    let help = "Bytes of NARs that came from peers and were verified";
    registry.register("relayed_bytes", help, peers.relayed_bytes.clone());
    let help = "Bytes of NARs as they came from peers, packed or not";
    registry.register("wire_bytes", help, peers.wire_bytes.clone());
    registry.register("peer_lies", "Claims of peers that proved wrong", peers.lies.clone());
    let help = "Peers of which it is known what they hold";
    registry.register("holdings_known", help, peers.holdings_known.clone());
    let help = "Bytes in which peers told what they hold";
    registry.register("holdings_received_bytes", help, peers.holdings_bytes.clone());
    let help = "Questions to peers that were not asked, since they do not hold the path";
    registry.register("peer_requests_spared", help, peers.not_asked.clone());
    registry.register("lookups", "Lookups on the LAN, by outcome", lookups.outcomes.clone());
    registry.register("lookup_seconds", "Seconds of a lookup on the LAN", lookups.seconds.clone());
    let help = "Requests that joined a lookup that was under way";
    registry.register("lookups_joined", help, lookups.joined.clone());
    let help = "Narinfos of peers that no trusted key has signed";
    registry.register("untrusted_narinfos", help, lookups.untrusted.clone());
    let help = "Misses that are remembered";
    registry.register("remembered_misses", help, lookups.remembered_misses.clone());
}
