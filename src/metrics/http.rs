//! What HTTP counts: requests by route and status, seconds, bytes, connections.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::fmt::Write as _;

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
    /// `api/v1/holdings`, which may wait for something to tell.
    Holdings,
    /// `/health`, `/metrics`, `/public-key`
    Admin,
    /// Nothing that exists.
    Unknown,
}

/// Every route.
pub const ROUTES: [Route; 8] = [
    Route::CacheInfo,
    Route::Narinfo,
    Route::Nar,
    Route::Listing,
    Route::Log,
    Route::Holdings,
    Route::Admin,
    Route::Unknown,
];

impl EncodeLabelValue for Route {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::CacheInfo => "cache_info",
            Self::Narinfo => "narinfo",
            Self::Nar => "nar",
            Self::Listing => "listing",
            Self::Log => "log",
            Self::Holdings => "holdings",
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

const REFUSALS: [Refusal; 4] =
    [Refusal::Connections, Refusal::Address, Refusal::HeaderTime, Refusal::IdleTime];

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
#[derive(Debug)]
pub struct HttpMetrics {
    requests: Family<RequestLabels, Counter>,
    seconds: Family<RouteLabel, Histogram, fn() -> Histogram>,
    bytes: Family<RouteLabel, Counter>,
    closed: Family<RefusalLabel, Counter>,
    zstd_input_bytes: Counter,
    zstd_output_bytes: Counter,
    /// Connections that are open now.
    pub connections: Gauge,
    /// NARs that ended before their last byte because the store changed underneath.
    pub nar_cuts: Counter,
}

impl HttpMetrics {
    pub(super) fn new() -> Self {
        let metrics = Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(request_seconds),
            bytes: Family::default(),
            closed: Family::default(),
            zstd_input_bytes: Counter::default(),
            zstd_output_bytes: Counter::default(),
            connections: Gauge::default(),
            nar_cuts: Counter::default(),
        };
        // A series that begins with its first event has no rate over it: the usual ones stand at 0 from the start.
        for route in ROUTES {
            let _ = metrics.bytes.get_or_create(&RouteLabel { route });
            let _ = metrics.seconds.get_or_create(&RouteLabel { route });
        }
        for reason in REFUSALS {
            let _ = metrics.closed.get_or_create(&RefusalLabel { reason });
        }
        metrics
    }

    /// Counts one answered request; `seconds` up to the answer's headers.
    pub fn request(&self, route: Route, status: u16, seconds: f64) {
        self.requests.get_or_create(&RequestLabels { route, status }).inc();
        self.seconds.get_or_create(&RouteLabel { route }).observe(seconds);
    }

    /// Counts bytes of bodies.
    pub fn bytes(&self, route: Route, bytes: u64) {
        self.bytes.get_or_create(&RouteLabel { route }).inc_by(bytes);
    }

    /// Counts bytes that were packed as zstd, before and after.
    pub fn packed(&self, input_bytes: u64, output_bytes: u64) {
        self.zstd_input_bytes.inc_by(input_bytes);
        self.zstd_output_bytes.inc_by(output_bytes);
    }

    /// Counts a connection that was refused or cut.
    pub fn closed(&self, reason: Refusal) {
        self.closed.get_or_create(&RefusalLabel { reason }).inc();
    }
}

/// From 100 µs, four times as much each step, to 1.6 s.
pub(super) fn request_seconds() -> Histogram {
    Histogram::new([0.0001, 0.0004, 0.0016, 0.0064, 0.025, 0.1, 0.4, 1.6])
}

pub(super) fn register(registry: &mut Registry, http: &HttpMetrics) {
    let help = "Requests that were answered, by route and status";
    registry.register("http_requests", help, http.requests.clone());
    let help = "Seconds from a request's headers to its answer's";
    registry.register("http_request_seconds", help, http.seconds.clone());
    let help = "Bytes of bodies that were sent";
    registry.register("http_response_bytes", help, http.bytes.clone());
    let help = "Bytes of NARs that were packed as zstd";
    registry.register("zstd_input_bytes", help, http.zstd_input_bytes.clone());
    let help = "Bytes of zstd that they came to";
    registry.register("zstd_output_bytes", help, http.zstd_output_bytes.clone());
    let help = "Connections that are open";
    registry.register("http_connections", help, http.connections.clone());
    let help = "Connections that were refused or cut, by reason";
    registry.register("http_connections_closed", help, http.closed.clone());
    let help = "NARs that ended before their last byte because the store changed";
    registry.register("http_nar_cuts", help, http.nar_cuts.clone());
}
