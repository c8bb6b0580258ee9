//! One request: let in or refused, counted, answered.
//!
//! The files of the cache are parsed here by hand (their names are not paths of segments); the pages for people and
//! machines go through axum's router.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::body::Body;
use axum::extract::State;
use axum::routing::get;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, HeaderMap};
use hyper::{Method, Request, Response, StatusCode};
use tower::ServiceExt as _;
use tracing::Instrument as _;

use super::Options;
use super::activity::Activity;
use super::answer::{Refused, found};
use super::cache::{CacheFiles, route};
use super::counted_body::CountedBody;
use super::gate::Admitted;
use crate::metrics::{Metrics, Route};
use crate::nix::cache_url::CacheUrl;
use crate::resolve::{Resolver, StoreState};

/// What answers requests; one for all connections.
#[derive(Clone, Debug)]
pub(super) struct App {
    files: CacheFiles,
    pages: axum::Router,
    metrics: Metrics,
    requests: Arc<AtomicU64>,
}

#[derive(Clone)]
struct Pages {
    resolver: Resolver,
    metrics: Metrics,
}

impl App {
    pub(super) fn new(resolver: Resolver, options: &Options, metrics: Metrics) -> Self {
        let files = CacheFiles::new(resolver.clone(), options, metrics.http.clone());
        let pages = axum::Router::new()
            .route("/", get(welcome))
            .route("/health", get(health))
            .route("/metrics", get(metrics_page))
            .route("/public-key", get(public_key))
            .with_state(Pages { resolver, metrics: metrics.clone() });
        Self { files, pages, metrics, requests: Arc::default() }
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
        let (method, url) =
            (request.method().clone(), CacheUrl::parse(request.uri().path(), request.uri().query()));
        let route = url.as_ref().map_or(Route::Unknown, route);
        let readable = method == Method::GET || method == Method::HEAD;
        let (route, answer) = if !client.is_allowed {
            (route, Refused::NotAllowed.into_answer())
        } else if let Err(seconds) = client.count_request() {
            (route, Refused::TooMany(seconds).into_answer())
        } else if !readable {
            (route, Refused::Method.into_answer())
        } else if let Some(answer) = url.as_ref().and_then(|url| self.files.at_once(url)) {
            (route, answer)
        } else {
            let id = self.requests.fetch_add(1, Ordering::Relaxed);
            let span = tracing::info_span!("request", id, client = %client.address, %method, path = request.uri().path());
            self.answer_slowly(request, url, route).instrument(span).await
        };
        let status = answer.status();
        tracing::debug!(client = %client.address, ?route, status = status.as_u16(), elapsed_us = began.elapsed().as_micros(), "answered");
        self.metrics.http.request(route, status.as_u16(), began.elapsed().as_secs_f64());
        answer.map(|body| CountedBody::new(body, route, self.metrics.http.clone(), activity))
    }

    async fn answer_slowly(
        &self,
        request: Request<Incoming>,
        url: Option<CacheUrl>,
        route: Route,
    ) -> (Route, Response<Body>) {
        let Some(url) = url else { return self.page(request).await };
        let answer = match self.files.answer(request.method(), &url, request.headers()).await {
            Ok(answer) => answer,
            Err(refused) => {
                if let Refused::Failed(error) = &refused {
                    tracing::warn!(%error, "answered with 404");
                }
                refused.into_answer()
            }
        };
        (route, answer)
    }

    async fn page(&self, request: Request<Incoming>) -> (Route, Response<Body>) {
        let Ok(answer) = self.pages.clone().oneshot(request).await;
        match answer.status() {
            StatusCode::NOT_FOUND => (Route::Unknown, Refused::Malformed.into_answer()),
            _ => (Route::Admin, answer),
        }
    }
}

async fn welcome(State(pages): State<Pages>) -> Response<Body> {
    let text = format!(
        "peernix {}: a binary cache for Nix made of the machines on this LAN.\n\
         The local Nix asks it with this line in nix.conf:\n\
         \n    extra-substituters = http://127.0.0.1:9999/nix-cache\n\n\
         What is built on this host is trusted where its key is:\n\
         \n    extra-trusted-public-keys = {}\n\n\
         /health  /metrics  /public-key  /nix-cache-info\n",
        env!("CARGO_PKG_VERSION"),
        pages.resolver.signer().public_key_line(),
    );
    found("text/plain; charset=utf-8", text.into())
}

async fn health(State(pages): State<Pages>) -> Response<Body> {
    let store = match &*pages.resolver.store().state().borrow() {
        StoreState::Starting => "starting".to_owned(),
        StoreState::Serving => "serving".to_owned(),
        StoreState::Unavailable(error) => format!("unavailable: {error}"),
    };
    let line = serde_json::json!({
        "status": "ok",
        "version": env!("CARGO_PKG_VERSION"),
        "store": store,
    });
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
