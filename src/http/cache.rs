//! The files of the binary cache: nix-cache-info, narinfo, NAR, listing, log.

use axum::body::Body;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use hyper::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE,
};
use hyper::{Method, Response, StatusCode};
use tokio::sync::OwnedSemaphorePermit;

use super::Options;
use super::answer::{Refused, found};
use super::gate::Admitted;
use super::nar_body::NarBody;
use super::range::{self, Wanted};
use crate::metrics::{HttpMetrics, Route};
use crate::nix::cache_info::CacheInfo;
use crate::nix::cache_url::{CacheUrl, NarUrl};
use crate::resolve::{LocalNar, Nar, RelayedNar, Resolver, Scope};

const NARINFO: &str = "text/x-nix-narinfo";

/// Answers for the files of the cache.
#[derive(Clone, Debug)]
pub(super) struct CacheFiles {
    resolver: Resolver,
    cache_info: Bytes,
    metrics: HttpMetrics,
}

/// The route that a URL counts under.
pub(super) fn route(url: &CacheUrl) -> Route {
    match url {
        CacheUrl::CacheInfo => Route::CacheInfo,
        CacheUrl::NarInfo(_) => Route::Narinfo,
        CacheUrl::Nar(_) => Route::Nar,
        CacheUrl::Listing(_) => Route::Listing,
        CacheUrl::Log(_) => Route::Log,
    }
}

impl CacheFiles {
    pub(super) fn new(resolver: Resolver, options: &Options, metrics: HttpMetrics) -> Self {
        let cache_info = CacheInfo {
            store_dir: resolver.store().store_dir().as_str().to_owned(),
            want_mass_query: options.want_mass_query,
            priority: options.priority,
        };
        Self { resolver, cache_info: cache_info.to_text().into(), metrics }
    }

    /// The answer, if it can be had without waiting: the way of nearly every request for a narinfo.
    pub(super) fn at_once(
        &self,
        url: &CacheUrl,
        headers: &HeaderMap,
        client: &Admitted,
    ) -> Option<Response<Body>> {
        match url {
            CacheUrl::CacheInfo => Some(found("text/x-nix-cache-info", self.cache_info.clone())),
            CacheUrl::NarInfo(hash) => {
                let known = self.resolver.narinfo_at_once(hash, client.scope(headers))?;
                Some(known.map_or_else(|| Refused::NotFound.into_answer(), |text| found(NARINFO, text)))
            }
            CacheUrl::Nar(_) | CacheUrl::Listing(_) | CacheUrl::Log(_) => None,
        }
    }

    pub(super) async fn answer(
        &self,
        method: &Method,
        url: &CacheUrl,
        headers: &HeaderMap,
        client: &Admitted,
    ) -> Result<Response<Body>, Refused> {
        let (kind, body) = match url {
            CacheUrl::CacheInfo => ("text/x-nix-cache-info", Some(self.cache_info.clone())),
            CacheUrl::NarInfo(hash) => (NARINFO, self.resolver.narinfo(hash, client.scope(headers)).await?),
            CacheUrl::Nar(url) => return self.nar(method, url, headers, client).await,
            CacheUrl::Listing(hash) => {
                let place = client.heavy_work().await.ok_or(Refused::Busy)?;
                return whole("application/json", self.resolver.listing(hash).await?, place);
            }
            CacheUrl::Log(path) => {
                let place = client.heavy_work().await.ok_or(Refused::Busy)?;
                return whole("text/plain; charset=utf-8", self.resolver.log(path).await?, place);
            }
        };
        body.map(|body| found(kind, body)).ok_or(Refused::NotFound)
    }

    async fn nar(
        &self,
        method: &Method,
        url: &NarUrl,
        headers: &HeaderMap,
        client: &Admitted,
    ) -> Result<Response<Body>, Refused> {
        let scope = client.scope(headers);
        let answer = self.nar_from_anywhere(method, url, headers, client, scope).await;
        let is_gone = matches!(answer, Err(Refused::NotFound | Refused::Failed(_)));
        if is_gone && scope == Scope::LocalThenPeers && url.nar_hash.is_some() {
            // Whoever knows NarHash was given the narinfo: from here, before a restart perhaps, or from a peer through us.
            tracing::info!(store_path.hash = %url.hash, "a NAR is gone: its path was collected after its narinfo was given out, and no peer gives it; Nix asks its next substituter");
        }
        answer
    }

    async fn nar_from_anywhere(
        &self,
        method: &Method,
        url: &NarUrl,
        headers: &HeaderMap,
        client: &Admitted,
        scope: Scope,
    ) -> Result<Response<Body>, Refused> {
        match self.resolver.nar(url, scope).await?.ok_or(Refused::NotFound)? {
            Nar::Local(nar) => match self.local_nar(method, nar, headers, client).await {
                // Half deleted, or damaged: a peer may have it whole.
                Err(Refused::Failed(error)) => match self.resolver.nar_elsewhere(url, scope).await {
                    Some(nar) => self.relayed_nar(method, nar).await,
                    None => Err(Refused::Failed(error)),
                },
                answer => answer,
            },
            Nar::Relayed(nar) => self.relayed_nar(method, *nar).await,
        }
    }

    async fn local_nar(
        &self,
        method: &Method,
        nar: LocalNar,
        headers: &HeaderMap,
        client: &Admitted,
    ) -> Result<Response<Body>, Refused> {
        let (len, tag) = (nar.info().nar_size, format!("\"{}\"", nar.info().nar_hash.to_base32()));
        // A range of another NAR than the one the client began with would be of no use to it.
        let same = headers.get(IF_RANGE).is_none_or(|wanted| wanted.as_bytes() == tag.as_bytes());
        let wanted = headers.get(RANGE).filter(|_| same && method == Method::GET);
        let (status, range) = match range::parse(wanted.and_then(|range| range.to_str().ok()), len) {
            Wanted::All => (StatusCode::OK, 0..len),
            Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
            Wanted::Unsatisfiable => return Err(Refused::Range(len)),
        };
        let body = if method == Method::HEAD {
            Body::empty()
        } else {
            // Only until the tree is laid out: a slow reader of a NAR holds a buffer, and no place.
            let place = client.heavy_work().await.ok_or(Refused::Busy)?;
            let stream = nar.stream(range.clone()).await?;
            drop(place);
            let (path, files) = (nar.info().store_path.clone(), client.files.clone());
            Body::new(NarBody::new(stream, path, self.metrics.clone(), files))
        };
        let mut answer = nar_answer(body, range.end - range.start);
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            headers.insert(ETAG, tag);
        }
        let place = format!("bytes {}-{}/{len}", range.start, range.end.saturating_sub(1));
        if let (StatusCode::PARTIAL_CONTENT, Ok(place)) = (status, HeaderValue::from_str(&place)) {
            headers.insert(CONTENT_RANGE, place);
        }
        Ok(answer)
    }

    /// Without ranges: the hash that is checked on the way is that of the whole.
    async fn relayed_nar(&self, method: &Method, nar: RelayedNar) -> Result<Response<Body>, Refused> {
        let len = nar.nar_size;
        if method == Method::HEAD {
            return Ok(nar_answer(Body::empty(), len));
        }
        let (span, cuts) = (tracing::Span::current(), self.metrics.nar_cuts.clone());
        let stream = nar.open().await.ok_or(Refused::NotFound)?;
        let stream = stream.inspect_err(move |error| {
            let _entered = span.enter();
            cuts.inc();
            tracing::warn!(%error, "a relayed NAR was cut short; the client was told by a closed connection");
        });
        Ok(nar_answer(Body::from_stream(stream), len))
    }
}

fn nar_answer(body: Body, len: u64) -> Response<Body> {
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-nix-nar"));
    headers.insert(CONTENT_LENGTH, len.into());
    answer
}

/// A body that is whole in memory; its place is free when it was sent.
fn whole(
    kind: &'static str,
    body: Option<Bytes>,
    place: OwnedSemaphorePermit,
) -> Result<Response<Body>, Refused> {
    struct Held {
        bytes: Bytes,
        _place: OwnedSemaphorePermit,
    }
    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            &self.bytes
        }
    }
    let bytes = body.ok_or(Refused::NotFound)?;
    Ok(found(kind, Bytes::from_owner(Held { bytes, _place: place })))
}
