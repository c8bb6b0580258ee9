//! Every counter, with its unit in its name.
//!
//! The lowest layer beside the formats: each part of the daemon is handed its own group and counts into it. Labels are
//! bounded: a route, a status, a reason; never a hash, a path or an address.

mod http;
mod peers;
mod relay;
mod store;

use std::collections::HashSet;
use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

pub use http::{HttpMetrics, ROUTES, Refusal, Route};
pub use peers::{LookupMetrics, PeerMetrics};
pub use relay::RelayMetrics;
pub use store::StoreMetrics;

/// All metrics of one daemon.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// What HTTP counts.
    pub http: Arc<HttpMetrics>,
    /// What the store counts.
    pub store: StoreMetrics,
    /// What discovery and the ways to peers count.
    pub peers: PeerMetrics,
    /// What lookups on the LAN count.
    pub lookups: LookupMetrics,
    /// What relaying NARs counts.
    pub relay: RelayMetrics,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VersionLabel {
    version: &'static str,
}

impl Metrics {
    /// A fresh set, registered under the names that `/metrics` shows.
    #[must_use]
    pub fn new() -> Self {
        let (http, store) = (Arc::new(HttpMetrics::new()), StoreMetrics::default());
        let (peers, lookups) = (PeerMetrics::default(), LookupMetrics::default());
        let relay = RelayMetrics::default();
        let mut registry = Registry::with_prefix("peernix");
        // A gauge and not OpenMetrics' info, which promtool can't read.
        let build = Family::<VersionLabel, Gauge>::default();
        build.get_or_create(&VersionLabel { version: env!("CARGO_PKG_VERSION") }).set(1);
        registry.register("build_info", "Always 1; the label tells the version that runs", build);
        http::register(&mut registry, &http);
        store::register(&mut registry, &store);
        peers::register(&mut registry, &peers, &lookups);
        relay::register(&mut registry, &relay);
        Self { registry: Arc::new(registry), http, store, peers, lookups, relay }
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

    #[test]
    fn what_did_not_happen_yet_stands_at_zero() {
        let text = Metrics::new().to_openmetrics();
        for (name, label, values) in [
            ("peer_requests", "outcome", &["ok", "unreachable", "wrong", "not_made"][..]),
            ("discovery_datagrams_received", "outcome", &["understood", "strange"]),
            ("lookups", "outcome", &["found", "missing", "unknown", "remembered_miss"]),
            ("http_connections_closed", "reason", &["connections", "address", "header_time", "idle_time"]),
        ] {
            for value in values {
                let line = format!("peernix_{name}_total{{{label}=\"{value}\"}} 0\n");
                assert!(text.contains(&line), "{line} is not in:\n{text}");
            }
        }
    }
}
