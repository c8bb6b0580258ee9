//! What relaying NARs counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What relaying NARs counts.
#[derive(Clone, Debug, Default)]
pub struct RelayMetrics {
    /// Downloads that went on with another peer.
    pub failovers: Counter,
    /// Pieces in which large NARs were asked for, each of one peer.
    pub pieces: Counter,
    /// Pieces that were asked of another peer too, since the first failed or was slow.
    pub reassigned: Counter,
    /// Requests that read a download which was under way or still there.
    pub joined: Counter,
    /// Downloads that were begun before anybody asked for them.
    pub prepared: Counter,
    /// Bytes of memory that spools take now.
    pub memory: Gauge,
    /// Bytes on disk that spools take now.
    pub disk: Gauge,
}

pub(super) fn register(registry: &mut Registry, relay: &RelayMetrics) {
    let help = "Downloads of NARs that went on with another peer";
    registry.register("relay_failovers", help, relay.failovers.clone());
    let help = "Pieces in which large NARs were asked for";
    registry.register("relay_pieces", help, relay.pieces.clone());
    let help = "Pieces of NARs that were asked of another peer since one failed or was slow";
    registry.register("relay_pieces_reassigned", help, relay.reassigned.clone());
    let help = "Requests for a NAR that was on its way, or still there";
    registry.register("relays_joined", help, relay.joined.clone());
    let help = "Downloads of NARs that were begun before they were asked for";
    registry.register("relays_prepared", help, relay.prepared.clone());
    registry.register("spool_memory_bytes", "Memory that spools take", relay.memory.clone());
    registry.register("spool_disk_bytes", "Disk that spools take", relay.disk.clone());
}
