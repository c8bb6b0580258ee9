//! Every counter, with its unit in its name.
//!
//! The lowest layer beside the formats: each part of the daemon is handed its own group and counts into it. Labels are
//! bounded: a route, a status, a reason; never a hash, a path or an address.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::Arc;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// All metrics of one daemon.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// What HTTP counts.
    pub http: HttpMetrics,
    /// What the store counts.
    pub store: StoreMetrics,
}

/// Where a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// `nix-cache-info`
    CacheInfo,
    /// `<hash>.narinfo`
    Narinfo,
    /// `nar/…`
    Nar,
    /// `<hash>.ls`
    Listing,
    /// `log/…`
    Log,
    /// `/health`, `/metrics`, `/public-key`
    Admin,
    /// Nothing that exists.
    Unknown,
}

/// Every route.
pub const ROUTES: [Route; 7] =
    [Route::CacheInfo, Route::Narinfo, Route::Nar, Route::Listing, Route::Log, Route::Admin, Route::Unknown];

impl EncodeLabelValue for Route {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::CacheInfo => "cache_info",
            Self::Narinfo => "narinfo",
            Self::Nar => "nar",
            Self::Listing => "listing",
            Self::Log => "log",
            Self::Admin => "admin",
            Self::Unknown => "unknown",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: Route,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabel {
    route: Route,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VersionLabel {
    version: &'static str,
}

/// Why a connection was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// As many connections as `limits.connections` allows are open.
    Connections,
    /// As many from one address as `limits.connections_per_address` allows are open.
    Address,
    /// The headers took longer than `limits.header_time`.
    HeaderTime,
    /// Nothing moved for `limits.idle_time`.
    IdleTime,
}

impl EncodeLabelValue for Refusal {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::Connections => "connections",
            Self::Address => "address",
            Self::HeaderTime => "header_time",
            Self::IdleTime => "idle_time",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabel {
    reason: Refusal,
}

/// What HTTP counts.
#[derive(Clone, Debug)]
pub struct HttpMetrics {
    requests: Family<RequestLabels, Counter>,
    seconds: Family<RouteLabel, Histogram, fn() -> Histogram>,
    bytes: Family<RouteLabel, Counter>,
    closed: Family<RefusalLabel, Counter>,
    /// Connections that are open now.
    pub connections: Gauge,
    /// NARs that ended before their last byte because the store changed underneath.
    pub nar_cuts: Counter,
}

impl HttpMetrics {
    /// Counts one answered request; `seconds` up to the answer's headers.
    pub fn request(&self, route: Route, status: u16, seconds: f64) {
        self.requests.get_or_create(&RequestLabels { route, status }).inc();
        self.seconds.get_or_create(&RouteLabel { route }).observe(seconds);
    }

    /// Counts bytes of bodies.
    pub fn bytes(&self, route: Route, bytes: u64) {
        self.bytes.get_or_create(&RouteLabel { route }).inc_by(bytes);
    }

    /// Counts a connection that was refused or cut.
    pub fn closed(&self, reason: Refusal) {
        self.closed.get_or_create(&RefusalLabel { reason }).inc();
    }
}

/// What the store counts.
#[derive(Clone, Debug, Default)]
pub struct StoreMetrics {
    /// Paths that `nix-store` was asked about.
    pub queries: Counter,
    /// Temporary garbage-collector roots that are held now.
    pub leases: Gauge,
    /// Leases that could not be had, or were lost because the process that held them died.
    pub lease_failures: Counter,
    /// `nix-store --serve` processes that were started after one had died.
    pub child_restarts: Counter,
    /// Times that the store directory was read whole.
    pub scans: Counter,
    /// Names in the store directory.
    pub names: Gauge,
}

impl Metrics {
    /// A fresh set, registered under the names that `/metrics` shows.
    #[must_use]
    pub fn new() -> Self {
        let http = HttpMetrics {
            requests: Family::default(),
            seconds: Family::new_with_constructor(request_seconds),
            bytes: Family::default(),
            closed: Family::default(),
            connections: Gauge::default(),
            nar_cuts: Counter::default(),
        };
        let store = StoreMetrics::default();
        // A series that begins with its first event has no rate over it: the usual ones stand at 0 from the start.
        for route in ROUTES {
            let _ = http.bytes.get_or_create(&RouteLabel { route });
            let _ = http.seconds.get_or_create(&RouteLabel { route });
        }
        let mut registry = Registry::with_prefix("peernix");
        // A gauge and not OpenMetrics' info, which promtool can't read.
        let build = Family::<VersionLabel, Gauge>::default();
        build.get_or_create(&VersionLabel { version: env!("CARGO_PKG_VERSION") }).set(1);
        registry.register("build_info", "Always 1; the label tells the version that runs", build);
        register_http(&mut registry, &http);
        register_store(&mut registry, &store);
        Self { registry: Arc::new(registry), http, store }
    }

    /// The page in the OpenMetrics text format.
    #[must_use]
    pub fn to_openmetrics(&self) -> String {
        let mut text = String::new();
        // Writing to a String fails only if a metric's own encoding does, and then the page ends there.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// The page in Prometheus's own older text format, which every reader knows. There a counter's help and type stand
    /// under its whole name, `_total` included.
    #[must_use]
    pub fn to_prometheus(&self) -> String {
        let page = self.to_openmetrics();
        let type_of = |line: &str| {
            line.strip_prefix("# TYPE ").and_then(|rest| rest.strip_suffix(" counter")).map(str::to_owned)
        };
        let counters: HashSet<String> = page.lines().filter_map(type_of).collect();
        let mut text = String::with_capacity(page.len() + 64 * counters.len());
        for line in page.lines().filter(|line| *line != "# EOF") {
            let mut words = line.splitn(4, ' ');
            match (words.next(), words.next(), words.next(), words.next()) {
                (Some("#"), Some(kind), Some(name), Some(rest)) if counters.contains(name) => {
                    text.push_str(&format!("# {kind} {name}_total {rest}\n"));
                }
                _ => {
                    text.push_str(line);
                    text.push('\n');
                }
            }
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// From 100 µs, four times as much each step, to 1.6 s.
fn request_seconds() -> Histogram {
    Histogram::new([0.0001, 0.0004, 0.0016, 0.0064, 0.025, 0.1, 0.4, 1.6])
}

fn register_http(registry: &mut Registry, http: &HttpMetrics) {
    let help = "Requests that were answered, by route and status";
    registry.register("http_requests", help, http.requests.clone());
    let help = "Seconds from a request's headers to its answer's";
    registry.register("http_request_seconds", help, http.seconds.clone());
    let help = "Bytes of bodies that were sent";
    registry.register("http_response_bytes", help, http.bytes.clone());
    let help = "Connections that are open";
    registry.register("http_connections", help, http.connections.clone());
    let help = "Connections that were refused or cut, by reason";
    registry.register("http_connections_closed", help, http.closed.clone());
    let help = "NARs that ended before their last byte because the store changed";
    registry.register("http_nar_cuts", help, http.nar_cuts.clone());
}

fn register_store(registry: &mut Registry, store: &StoreMetrics) {
    let help = "Paths that nix-store was asked about";
    registry.register("store_queries", help, store.queries.clone());
    let help = "Temporary garbage-collector roots that are held";
    registry.register("store_leases", help, store.leases.clone());
    let help = "Leases that could not be had or were lost";
    registry.register("lease_failures", help, store.lease_failures.clone());
    let help = "nix-store processes that were started after one had died";
    registry.register("store_child_restarts", help, store.child_restarts.clone());
    let help = "Times that the store directory was read whole";
    registry.register("store_scans", help, store.scans.clone());
    let help = "Names in the store directory";
    registry.register("store_names", help, store.names.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_units_and_labels() {
        let metrics = Metrics::new();
        metrics.http.request(Route::Narinfo, 200, 0.001);
        metrics.http.closed(Refusal::HeaderTime);
        metrics.store.queries.inc();
        let text = metrics.to_openmetrics();
        assert!(metrics.to_prometheus().contains("# TYPE peernix_store_queries_total counter\n"));
        for line in [
            r#"peernix_http_requests_total{route="narinfo",status="200"} 1"#,
            r#"peernix_http_connections_closed_total{reason="header_time"} 1"#,
            "peernix_store_queries_total 1",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
    }
}
