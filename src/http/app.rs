//! One request: let in or refused, counted, answered.
//!
//! The files of the cache are parsed here by hand (their names are not paths of segments); the pages for people and
//! machines go through axum's router.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::routing::get;
use bytes::Bytes;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, HOST, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use tower::ServiceExt as _;
use tracing::Instrument as _;

use super::Options;
use super::activity::Activity;
use super::answer::{Refused, found, text_answer};
use super::api;
use super::cache::{CacheFiles, route};
use super::compressors::Compressors;
use super::counted_body::CountedBody;
use super::gate::Admitted;
use crate::metrics::{Metrics, Route};
use crate::nix::cache_url::CacheUrl;
use crate::resolve::{Holdings, INSTANCE_HEADER, PEER_HEADER, ResolveError, Resolver};

/// Lines a second that failed requests may write to the log.
const COMPLAINTS: NonZeroU32 = NonZeroU32::MIN;

/// What answers requests; one for all connections.
#[derive(Debug)]
pub(super) struct App {
    files: CacheFiles,
    pages: axum::Router,
    metrics: Metrics,
    /// Who answers, told to peers.
    instance: Option<HeaderValue>,
    requests: AtomicU64,
    complaints: DefaultDirectRateLimiter,
}

#[derive(Clone)]
struct Pages {
    resolver: Resolver,
    metrics: Metrics,
    since: Instant,
    has_loopback: bool,
}

impl App {
    pub(super) fn new(
        resolver: Resolver,
        options: &Options,
        compressors: Compressors,
        metrics: Metrics,
    ) -> Self {
        let files = CacheFiles::new(resolver.clone(), options, compressors, metrics.http.clone());
        let instance = HeaderValue::from_str(resolver.peers().own_id()).ok();
        let pages = axum::Router::new()
            .route("/", get(welcome))
            .route("/nix-cache", get(welcome))
            .route("/nix-cache/", get(welcome))
            .route("/health", get(health))
            .route("/metrics", get(metrics_page))
            .route("/public-key", get(public_key))
            .route("/api/v1/peers", get(api_peers))
            .route("/api/v1/status", get(api_status))
            .route("/api/v1/holdings", get(holdings))
            .route("/nix-cache/api/v1/holdings", get(holdings))
            .with_state(Pages {
                resolver,
                metrics: metrics.clone(),
                since: Instant::now(),
                has_loopback: options.loopback().is_some(),
            });
        let complaints = RateLimiter::direct(Quota::per_second(COMPLAINTS));
        Self { files, pages, metrics, instance, requests: AtomicU64::new(0), complaints }
    }

    /// Answers one request. Never fails: whatever goes wrong is an answer too.
    pub(super) async fn answer(
        &self,
        request: Request<Incoming>,
        client: &Admitted,
        activity: Arc<Activity>,
    ) -> Response<CountedBody> {
        let began = Instant::now();
        activity.request_began();
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let is_of_a_peer = request.headers().contains_key(PEER_HEADER);
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let url = CacheUrl::parse(uri.path(), uri.query());
        let route = url.as_ref().map_or(Route::Unknown, route);
        let readable = method == Method::GET || method == Method::HEAD;
        let (route, mut answer) = if !client.is_allowed {
            (route, Refused::NotAllowed.into_answer())
        } else if let Err(seconds) = client.count_request() {
            (route, Refused::TooMany(seconds).into_answer())
        } else if !readable {
            (route, Refused::Method.into_answer())
        } else if let Some(answer) =
            url.as_ref().and_then(|url| self.files.at_once(url, request.headers(), client))
        {
            (route, answer)
        } else {
            let span =
                tracing::info_span!("request", id, client = %client.address, %method, path = uri.path());
            self.answer_slowly(request, url, route, client).instrument(span).await
        };
        if let Some(instance) = self.instance.clone().filter(|_| is_of_a_peer) {
            answer.headers_mut().insert(INSTANCE_HEADER, instance);
        }
        let status = answer.status().as_u16();
        let elapsed = began.elapsed();
        tracing::debug!(
            request.id = id,
            client = %client.address,
            %method,
            path = uri.path(),
            status,
            elapsed_us = elapsed.as_micros(),
            "answered"
        );
        self.metrics.http.request(route, status, elapsed.as_secs_f64());
        answer.map(|body| CountedBody::new(body, route, self.metrics.http.clone(), activity))
    }

    async fn answer_slowly(
        &self,
        request: Request<Incoming>,
        url: Option<CacheUrl>,
        route: Route,
        client: &Admitted,
    ) -> (Route, Response<Body>) {
        let Some(url) = url else { return self.page(request).await };
        let answer = match self.files.answer(&request, &url, client).await {
            Ok(answer) => answer,
            Err(refused) => {
                if let Refused::Failed(error) = &refused {
                    self.complain(error);
                }
                refused.into_answer()
            }
        };
        (route, answer)
    }

    /// Says why a request failed, but not a thousand times a second: a client must not fill our log.
    fn complain(&self, error: &ResolveError) {
        // The store says itself, once, that it can't be asked.
        if error.is_known() || self.complaints.check().is_err() {
            tracing::debug!(%error, "answered with 404");
        } else {
            tracing::warn!(%error, "answered with 404");
        }
    }

    async fn page(&self, request: Request<Incoming>) -> (Route, Response<Body>) {
        let path = request.uri().path();
        let is_of_holdings = path.strip_prefix("/nix-cache").unwrap_or(path) == "/api/v1/holdings";
        let Ok(answer) = self.pages.clone().oneshot(request).await;
        match answer.status() {
            _ if is_of_holdings => (Route::Holdings, answer),
            StatusCode::NOT_FOUND => (Route::Unknown, Refused::Malformed.into_answer()),
            _ => (Route::Admin, answer),
        }
    }
}

async fn welcome(State(pages): State<Pages>, headers: HeaderMap) -> Response<Body> {
    // The port that the reader has come to, whichever of ours that is.
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let port = host.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok()).unwrap_or(80);
    let local = match pages.has_loopback {
        true => format!(
            "The local Nix asks it with this line in nix.conf:\n\
             \n    extra-substituters = http://127.0.0.1:{port}/nix-cache\n\n"
        ),
        false => "The local Nix can't ask it: http.listen has no address on loopback.\n\n".to_owned(),
    };
    let text = format!(
        "peernix {}: a binary cache for Nix made of the machines on this LAN.\n\
         {local}\
         What is built on this host is trusted where its key is:\n\
         \n    extra-trusted-public-keys = {}\n\n\
         /health  /metrics  /public-key  /nix-cache-info  /api/v1/status  /api/v1/peers\n",
        env!("CARGO_PKG_VERSION"),
        pages.resolver.signer().public_key_line(),
    );
    found("text/plain; charset=utf-8", text.into())
}

async fn health(State(pages): State<Pages>) -> Response<Body> {
    let (status, store) = api::health(&pages.resolver);
    let (version, peers) = (env!("CARGO_PKG_VERSION"), pages.resolver.peers().len());
    let line = serde_json::json!({ "status": status, "version": version, "store": store, "peers": peers });
    found("application/json", format!("{line}\n").into())
}

async fn metrics_page(State(pages): State<Pages>, headers: HeaderMap) -> Response<Body> {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accept.contains("application/openmetrics-text") {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        found(kind, pages.metrics.to_openmetrics().into())
    } else {
        found("text/plain; version=0.0.4; charset=utf-8", pages.metrics.to_prometheus().into())
    }
}

async fn public_key(State(pages): State<Pages>) -> Response<Body> {
    let lines = pages.resolver.signer().public_key_line().replace(' ', "\n");
    found("text/plain; charset=utf-8", format!("{lines}\n").into())
}

async fn api_peers(State(pages): State<Pages>) -> Response<Body> {
    found("application/json", api::peers(&pages.resolver).into())
}

/// For peers: waits for something to tell if they know all that there is.
async fn holdings(State(pages): State<Pages>, RawQuery(query): RawQuery) -> Response<Body> {
    let known = query.as_deref().and_then(|query| query.strip_prefix("since="));
    match pages.resolver.holdings(known).await {
        Some(Holdings::Told(bytes)) => found("application/octet-stream", bytes),
        Some(Holdings::AsKnown) => {
            text_answer(StatusCode::NOT_MODIFIED, "application/octet-stream", Bytes::new())
        }
        None => Refused::Busy.into_answer(),
    }
}

async fn api_status(State(pages): State<Pages>) -> Response<Body> {
    found("application/json", api::status(&pages.resolver, pages.since.elapsed()).into())
}
