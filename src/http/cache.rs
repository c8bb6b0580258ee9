//! The files of the binary cache: nix-cache-info, narinfo, NAR, listing, log.

use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use hyper::body::Incoming;
use hyper::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG,
    HeaderMap, HeaderValue, IF_RANGE, RANGE, VARY,
};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::sync::OwnedSemaphorePermit;

use super::answer::{Refused, found};
use super::compressors::{Compressors, Packing};
use super::gate::Admitted;
use super::nar_body::NarBody;
use super::packed::packed;
use super::range::{self, Wanted};
use super::{Compression, Options};
use crate::metrics::{HttpMetrics, Route};
use crate::nix::cache_info::CacheInfo;
use crate::nix::cache_url::{CacheUrl, NarUrl};
use crate::nix::narinfo::FileForm;
use crate::resolve::{LINK_HEADER, LocalNar, Nar, PEER_HEADER, RelayedNar, Resolver, Scope};

/// What the log says of a NAR that broke off on its way, and of one that comes from a peer.
const CUT: &str = "a NAR was cut short; the client was told by a closed connection";
const RELAYED_CUT: &str = "a relayed NAR was cut short; the client was told by a closed connection";
const NARINFO: &str = "text/x-nix-narinfo";
/// A shorter NAR goes as it is: the way there and back takes longer than its bytes.
const SHORTEST_PACKED: u64 = 16 * 1024;

/// Whether a NAR is encoded depends on these.
const ENCODED_BY: &str = "accept-encoding, x-peernix-peer, x-peernix-link";

/// Answers for the files of the cache.
#[derive(Debug)]
pub(super) struct CacheFiles {
    resolver: Resolver,
    cache_info: Bytes,
    compression: Compression,
    compressors: Compressors,
    metrics: Arc<HttpMetrics>,
}

/// What is asked for of a NAR, by whom.
#[derive(Clone, Copy)]
struct Asked<'a> {
    method: &'a Method,
    form: FileForm,
    headers: &'a HeaderMap,
    version: Version,
    client: &'a Admitted,
}

impl Asked<'_> {
    /// Whether the end of a body of unknown length is told in words. It is not before HTTP/1.1: a body that breaks off ends as
    /// a whole one does there.
    fn hears_the_end(&self) -> bool {
        self.version >= Version::HTTP_11
    }
}

/// The route that a URL counts under.
pub(super) fn route(url: &CacheUrl) -> Route {
    match url {
        CacheUrl::CacheInfo => Route::CacheInfo,
        CacheUrl::NarInfo(_) => Route::Narinfo,
        CacheUrl::Nar(_) | CacheUrl::PackedNar(_) => Route::Nar,
        CacheUrl::Listing(_) => Route::Listing,
        CacheUrl::Log(_) => Route::Log,
    }
}

impl CacheFiles {
    pub(super) fn new(
        resolver: Resolver,
        options: &Options,
        compressors: Compressors,
        metrics: Arc<HttpMetrics>,
    ) -> Self {
        let cache_info = CacheInfo {
            store_dir: resolver.store().store_dir().as_str().to_owned(),
            want_mass_query: options.want_mass_query,
            priority: options.priority,
        };
        let (cache_info, compression) = (cache_info.to_text().into(), options.compression);
        Self { resolver, cache_info, compression, compressors, metrics }
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
                let (scope, form) = (client.scope(headers), self.form_for(headers));
                let known = self.resolver.narinfo_at_once(hash, scope, form)?;
                Some(known.map_or_else(|| Refused::NotFound.into_answer(), |text| found(NARINFO, text)))
            }
            CacheUrl::Nar(_) | CacheUrl::PackedNar(_) | CacheUrl::Listing(_) | CacheUrl::Log(_) => None,
        }
    }

    pub(super) async fn answer(
        &self,
        request: &Request<Incoming>,
        url: &CacheUrl,
        client: &Admitted,
    ) -> Result<Response<Body>, Refused> {
        let (kind, body) = match url {
            CacheUrl::CacheInfo => ("text/x-nix-cache-info", Some(self.cache_info.clone())),
            CacheUrl::NarInfo(hash) => {
                let headers = request.headers();
                let (scope, form) = (client.scope(headers), self.form_for(headers));
                (NARINFO, self.resolver.narinfo(hash, scope, form).await?)
            }
            CacheUrl::Nar(url) => return self.nar(request, url, FileForm::Plain, client).await,
            CacheUrl::PackedNar(url) => return self.nar(request, url, FileForm::Zstd, client).await,
            CacheUrl::Listing(hash) => {
                let place = client.place_in_memory().await.ok_or(Refused::Busy)?;
                let laying_out = client.place_to_lay_out().await.ok_or(Refused::Busy)?;
                let listing = self.resolver.listing(hash).await?;
                drop(laying_out);
                return whole("application/json", listing, place);
            }
            CacheUrl::Log(path) => {
                let place = client.place_in_memory().await.ok_or(Refused::Busy)?;
                return whole("text/plain; charset=utf-8", self.resolver.log(path).await?, place);
            }
        };
        body.map(|body| found(kind, body)).ok_or(Refused::NotFound)
    }

    async fn nar(
        &self,
        request: &Request<Incoming>,
        url: &NarUrl,
        form: FileForm,
        client: &Admitted,
    ) -> Result<Response<Body>, Refused> {
        let (method, headers, version) = (request.method(), request.headers(), request.version());
        let scope = client.scope(headers);
        let asked = Asked { method, form, headers, version, client };
        let answer = self.nar_from_anywhere(url, asked, scope).await;
        let is_gone = matches!(answer, Err(Refused::NotFound | Refused::Failed(_)));
        if is_gone && scope == Scope::LocalThenPeers && url.nar_hash.is_some() {
            // Whoever knows NarHash was given the narinfo: from here, before a restart perhaps, or from a peer through us.
            tracing::info!(store_path.hash = %url.hash, "a NAR is gone: its path was collected after its narinfo was given out, and no peer gives it; Nix asks its next substituter");
        }
        answer
    }

    async fn nar_from_anywhere(
        &self,
        url: &NarUrl,
        asked: Asked<'_>,
        scope: Scope,
    ) -> Result<Response<Body>, Refused> {
        match self.resolver.nar(url, scope).await?.ok_or(Refused::NotFound)? {
            Nar::Local(nar) => match self.local_nar(nar, asked).await {
                // Half deleted, or damaged: a peer may have it whole.
                Err(Refused::Failed(error)) => match self.resolver.nar_elsewhere(url, scope).await {
                    Some(nar) => self.relayed_nar(nar, asked).await,
                    None => Err(Refused::Failed(error)),
                },
                answer => answer,
            },
            Nar::Relayed(nar) => self.relayed_nar(*nar, asked).await,
        }
    }

    async fn local_nar(&self, nar: LocalNar, asked: Asked<'_>) -> Result<Response<Body>, Refused> {
        let Asked { method, form, headers, client, .. } = asked;
        if form == FileForm::Zstd && method == Method::HEAD {
            return Ok(zstd_answer(Body::empty()));
        }
        let (len, tag) = (nar.info().nar_size, format!("\"{}\"", nar.info().nar_hash.to_base32()));
        // A range of another NAR than the one the client began with would be of no use to it.
        let same = headers.get(IF_RANGE).is_none_or(|wanted| wanted.as_bytes() == tag.as_bytes());
        let may_be_a_part = same && method == Method::GET && form == FileForm::Plain;
        let wanted = headers.get(RANGE).filter(|_| may_be_a_part);
        let (status, range) = match range::parse(wanted.and_then(|range| range.to_str().ok()), len) {
            Wanted::All => (StatusCode::OK, 0..len),
            Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
            Wanted::Unsatisfiable => return Err(Refused::Range(len)),
        };
        let packing = match form {
            FileForm::Zstd => self.packing_for_client(asked),
            FileForm::Plain => self.packing(len, asked),
        };
        if form == FileForm::Zstd || packing.is_some() {
            let place = client.place_to_lay_out().await.ok_or(Refused::Busy)?;
            let stream = nar.stream(0..len).await?;
            drop(place);
            let stream = self.told_if_cut(packed(stream, len, packing, &self.metrics), CUT);
            let body = Body::from_stream(stream);
            return Ok(if form == FileForm::Zstd { zstd_answer(body) } else { encoded_answer(body, &tag) });
        }
        let body = if method == Method::HEAD {
            Body::empty()
        } else {
            // Only until the tree is laid out: a slow reader of a NAR keeps nobody from that.
            let place = client.place_to_lay_out().await.ok_or(Refused::Busy)?;
            let stream = nar.stream(range.clone()).await?;
            drop(place);
            let (path, files) = (nar.info().store_path.clone(), client.files.clone());
            Body::new(NarBody::new(stream, path, self.metrics.clone(), files))
        };
        let mut answer = nar_answer(body, range.end - range.start);
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        headers.insert(VARY, HeaderValue::from_static(ENCODED_BY));
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
    async fn relayed_nar(&self, nar: RelayedNar, asked: Asked<'_>) -> Result<Response<Body>, Refused> {
        let (len, is_packed) = (nar.nar_size, asked.form == FileForm::Zstd);
        if asked.method == Method::HEAD {
            let body = Body::empty();
            return Ok(if is_packed { zstd_answer(body) } else { nar_answer(body, len) });
        }
        let stream = nar.open().await.ok_or(Refused::NotFound)?;
        if is_packed {
            // The path was here when its narinfo was given out.
            let packing = self.packing_for_client(asked);
            let stream = self.told_if_cut(packed(stream, len, packing, &self.metrics), RELAYED_CUT);
            return Ok(zstd_answer(Body::from_stream(stream)));
        }
        Ok(nar_answer(Body::from_stream(self.told_if_cut(stream, RELAYED_CUT)), len))
    }

    /// Which file a narinfo names: peers get the plain one, whose bytes are those that are hashed.
    fn form_for(&self, headers: &HeaderMap) -> FileForm {
        let is_packed = self.compression == Compression::Zstd && !headers.contains_key(PEER_HEADER);
        if is_packed { FileForm::Zstd } else { FileForm::Plain }
    }

    /// Whether a NAR goes to a peer as zstd: where it asks for that, for all of it, and it is faster. Never on this host.
    fn packing(&self, len: u64, asked: Asked<'_>) -> Option<Packing> {
        let Asked { method, headers, client, .. } = asked;
        let is_peer = headers.contains_key(PEER_HEADER) && !client.address.is_loopback();
        if !is_peer
            || !asked.hears_the_end()
            || method != Method::GET
            || len < SHORTEST_PACKED
            || headers.contains_key(RANGE)
        {
            return None;
        }
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let accepted = text(ACCEPT_ENCODING.as_str())?;
        accepted.split(',').find(|encoding| encoding.trim() == "zstd")?;
        self.compressors.for_peer(client.address, text(LINK_HEADER)?.parse().ok()?)
    }

    /// How a NAR is packed whose file is zstd. `None`: in one frame that says how long it is, which breaks off if the body does.
    fn packing_for_client(&self, asked: Asked<'_>) -> Option<Packing> {
        asked.hears_the_end().then(|| self.compressors.for_client(asked.client.address)).flatten()
    }

    /// The same bytes; a failure is counted, and told in the log.
    fn told_if_cut<E: std::fmt::Display>(
        &self,
        stream: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
        what: &'static str,
    ) -> impl Stream<Item = Result<Bytes, E>> + Send + 'static {
        let (span, cuts) = (tracing::Span::current(), self.metrics.nar_cuts.clone());
        stream.inspect_err(move |error| {
            let _entered = span.enter();
            cuts.inc();
            tracing::warn!(%error, "{what}");
        })
    }
}

/// A file of zstd, which has no length before it was made.
fn zstd_answer(body: Body) -> Response<Body> {
    let mut answer = Response::new(body);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/zstd"));
    answer
}

/// A NAR that is encoded for the way: of no length that is known, and without ranges.
fn encoded_answer(body: Body, tag: &str) -> Response<Body> {
    let mut answer = Response::new(body);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-nix-nar"));
    headers.insert(CONTENT_ENCODING, HeaderValue::from_static("zstd"));
    headers.insert(VARY, HeaderValue::from_static(ENCODED_BY));
    if let Ok(tag) = HeaderValue::from_str(&format!("{}-zstd\"", tag.trim_end_matches('"'))) {
        headers.insert(ETAG, tag);
    }
    answer
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
