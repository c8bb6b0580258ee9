//! What the store counts: questions, leases, processes, names.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// What the store counts.
#[derive(Clone, Debug, Default)]
pub struct StoreMetrics {
    /// Paths that `nix-store` was asked about.
    pub queries: Counter,
    /// Valid paths that are kept from garbage collection now.
    pub leases: Gauge,
    /// Leases that could not be had, or were lost because the process that held them died.
    pub lease_failures: Counter,
    /// `nix-store --serve` processes that were started after one had died.
    pub child_restarts: Counter,
    /// Times that the store directory was read whole.
    pub scans: Counter,
    /// Names in the store directory.
    pub names: Gauge,
    /// NARs and ranges that were read from a copy instead of their trees.
    pub nars_from_copies: Counter,
    /// What copies take on the disk, in bytes.
    pub nar_copies_bytes: Gauge,
}

pub(super) fn register(registry: &mut Registry, store: &StoreMetrics) {
    let help = "Paths that nix-store was asked about";
    registry.register("store_queries", help, store.queries.clone());
    let help = "Valid paths that are kept from garbage collection";
    registry.register("store_leases", help, store.leases.clone());
    let help = "Leases that could not be had or were lost";
    registry.register("lease_failures", help, store.lease_failures.clone());
    let help = "nix-store processes that were started after one had died";
    registry.register("store_child_restarts", help, store.child_restarts.clone());
    let help = "Times that the store directory was read whole";
    registry.register("store_scans", help, store.scans.clone());
    let help = "Names in the store directory";
    registry.register("store_names", help, store.names.clone());
    let help = "NARs and ranges of them that were read from a copy";
    registry.register("nars_from_copies", help, store.nars_from_copies.clone());
    let help = "Disk that copies of NARs take";
    registry.register("nar_copies_bytes", help, store.nar_copies_bytes.clone());
}
