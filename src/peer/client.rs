//! The way to one peer: pooled connections, a deadline on everything, and errors that say whose fault it was.
//!
//! Knows what a binary cache answers, and nothing of whether it is true.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use prometheus_client::metrics::counter::Counter;
use reqwest::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::arriving::{Arriving, Measured};
use super::fetch_error::{FetchError, io_error, to_error};
use super::path_set::MAX_MESSAGE;
use super::record::{Asking, Peer};
use super::tls::http_client;
use super::wire::{MAX_DATAGRAM, Message};
use crate::nix::StorePathHash;

/// The header that a peer's request carries: whoever gets it answers from its own store alone.
pub const PEER_HEADER: &str = "x-peernix-peer";
/// The header of an answer to a peer that says which run of which host answers.
pub const INSTANCE_HEADER: &str = "x-peernix-instance";
/// The header of a peer's request for a NAR that says what the link between carries, in bytes a second: the NAR may be packed if
/// that is faster.
pub const LINK_HEADER: &str = "x-peernix-link";
/// The largest narinfo that is taken from a peer, in bytes: one with thousands of references.
const MAX_NARINFO: usize = 512 * 1024;
/// Longer answers of what a peer holds are read a few at a time, in bytes.
const SHORT_HOLDINGS: u64 = 128 * 1024;
/// Connections to a peer that are kept open for the next request.
const IDLE_CONNECTIONS: usize = 8;
/// For so long, or twice as long. Hundreds of peers would hold thousands of descriptors, and a new connection costs one round trip.
const IDLE_TIME: Duration = Duration::from_secs(10);
/// After how long a datagram is sent once more; the pause doubles.
const FIRST_RESEND: Duration = Duration::from_millis(30);

/// What a peer answers to the question what it holds.
#[derive(Debug)]
pub(super) enum HoldingsAnswer {
    /// Nothing came since.
    AsKnown,
    /// A message, not read yet.
    Told(Bytes),
}

/// The way to one peer. Cheap to clone: all clones share the connections.
#[derive(Clone, Debug)]
pub struct PeerClient {
    http: reqwest::Client,
    /// The peer's, as it is known by.
    url: String,
    base: String,
    asking: Asking,
    /// Who is expected there, if it said.
    instance: Option<String>,
    /// An answer said which run of peernix gave it.
    is_peernix: Arc<AtomicBool>,
    measured: Measured,
    /// It is on this host: packing would only cost.
    is_loopback: bool,
}

impl PeerClient {
    /// A client for a peer. `own_id` is told with each request; bytes of files are counted as they come on the wire.
    pub fn new(peer: &Peer, own_id: &str, wire_bytes: Counter) -> Result<Self, FetchError> {
        let mut headers = HeaderMap::new();
        let id = HeaderValue::from_str(own_id).map_err(|error| FetchError::Request(error.to_string()))?;
        headers.insert(PEER_HEADER, id);
        // Whatever is to be packed is asked for in words of its own.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        let mut builder = http_client(&peer.url)
            .map_err(|error| FetchError::Request(error.to_string()))?
            .default_headers(headers)
            .http1_only()
            .tcp_nodelay(true)
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .pool_idle_timeout(IDLE_TIME)
            .connect_timeout(Duration::from_secs(2));
        let base = match peer.address {
            // A link-local address needs its interface, which no URL can say.
            Some(address @ SocketAddr::V6(v6)) if v6.scope_id() != 0 => {
                builder = builder.resolve("peer.invalid", address);
                format!("http://peer.invalid:{}/nix-cache", address.port())
            }
            _ => peer.url.clone(),
        };
        let http = builder.build().map_err(|error| FetchError::Request(error.to_string()))?;
        Ok(Self {
            http,
            url: peer.url.clone(),
            base,
            asking: peer.asking,
            instance: peer.announce.id.clone(),
            is_peernix: Arc::default(),
            measured: Measured::new(wire_bytes),
            is_loopback: is_loopback(&peer.url),
        })
    }

    /// Whether an answer was given by peernix, and not by another cache or a version that does not say so.
    pub(super) fn is_peernix(&self) -> bool {
        self.is_peernix.load(Ordering::Relaxed)
    }

    /// Whether it is still the way to this peer.
    pub(super) fn leads_to(&self, peer: &Peer) -> bool {
        self.url == peer.url && self.asking == peer.asking
    }

    /// The text of a narinfo; `None` is "not here". At most `within`.
    pub async fn narinfo(&self, hash: &StorePathHash, within: Duration) -> Result<Option<Bytes>, FetchError> {
        let asked = async {
            if let Asking::Datagram(address) = self.asking
                && !has_path(address, hash).await?
            {
                return Ok(None);
            }
            let answer = self.get(&format!("{hash}.narinfo")).await?;
            match answer {
                Some(answer) => body(answer, MAX_NARINFO).await.map(Some),
                None => Ok(None),
            }
        };
        timeout(within, asked).await.map_err(|_| FetchError::Timeout(within))?
    }

    /// Begins to fetch a file of the cache, given by its path below it, from `offset` on if the peer can; `None` is "not here".
    pub async fn file(
        &self,
        path: &str,
        offset: u64,
        within: Duration,
    ) -> Result<Option<Arriving>, FetchError> {
        let asked = async {
            let mut request = self.http.get(format!("{}/{path}", self.base));
            let link = self.measured.link().to_be_packed();
            // Parts are parts of what is hashed: they come as they are.
            let link = link.filter(|_| offset == 0 && !self.is_loopback);
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            } else if let Some(link) = link {
                request = request.header(ACCEPT_ENCODING, "zstd").header(LINK_HEADER, link);
            }
            let answer = self.send(request).await?;
            let arriving =
                |answer, part| Arriving::new(answer, part, link.is_some(), self.measured.clone()).map(Some);
            match answer.status() {
                StatusCode::PARTIAL_CONTENT if offset > 0 && begins_at(&answer) == Some(offset) => {
                    arriving(answer, Some(offset))
                }
                _ => found(answer)?.map_or(Ok(None), |answer| arriving(answer, None)),
            }
        };
        timeout(within, asked).await.map_err(|_| FetchError::Timeout(within))?
    }

    /// Begins to fetch a part of a file of the cache, or all of it from a peer that has no ranges; `None` is "not here".
    pub async fn part(
        &self,
        path: &str,
        range: Range<u64>,
        within: Duration,
    ) -> Result<Option<Arriving>, FetchError> {
        let asked = async {
            let last = range.end.saturating_sub(1);
            let request = self.http.get(format!("{}/{path}", self.base));
            let answer = self.send(request.header(RANGE, format!("bytes={}-{last}", range.start))).await?;
            let arriving = |answer, part| Arriving::new(answer, part, false, self.measured.clone()).map(Some);
            match answer.status() {
                StatusCode::PARTIAL_CONTENT if begins_at(&answer) == Some(range.start) => {
                    arriving(answer, Some(range.start))
                }
                _ => found(answer)?.map_or(Ok(None), |answer| arriving(answer, None)),
            }
        };
        timeout(within, asked).await.map_err(|_| FetchError::Timeout(within))?
    }

    /// What it holds, or what it gained after the version that is `known`, which it may wait for. A long answer waits for
    /// one of the places for `reading`.
    pub(super) async fn holdings(
        &self,
        known: Option<&str>,
        within: Duration,
        reading: &Semaphore,
    ) -> Result<HoldingsAnswer, FetchError> {
        let asked = async {
            let since = known.map_or(String::new(), |known| format!("?since={known}"));
            let answer = self.send(self.http.get(format!("{}/api/v1/holdings{since}", self.base))).await?;
            match answer.status() {
                StatusCode::NOT_MODIFIED => Ok(HoldingsAnswer::AsKnown),
                StatusCode::OK => {
                    let is_short = answer.content_length().is_some_and(|len| len <= SHORT_HOLDINGS);
                    let _place = if is_short { None } else { reading.acquire().await.ok() };
                    body(answer, MAX_MESSAGE).await.map(HoldingsAnswer::Told)
                }
                status => Err(FetchError::Status(status.as_u16())),
            }
        };
        timeout(within, asked).await.map_err(|_| FetchError::Timeout(within))?
    }

    /// Whether it answers at all.
    pub async fn check(&self, within: Duration) -> Result<(), FetchError> {
        let asked = async {
            match self.get("nix-cache-info").await? {
                Some(answer) => body(answer, MAX_NARINFO).await.map(drop),
                None => Err(FetchError::Status(404)),
            }
        };
        timeout(within, asked).await.map_err(|_| FetchError::Timeout(within))?
    }

    async fn get(&self, path: &str) -> Result<Option<Response>, FetchError> {
        found(self.send(self.http.get(format!("{}/{path}", self.base))).await?)
    }

    /// Gives an answer only of whom was asked. Those that are no peernix, or an older one, do not say who they are.
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, FetchError> {
        let answer = request.send().await.map_err(to_error)?;
        let told = answer.headers().get(INSTANCE_HEADER);
        self.is_peernix.fetch_or(told.is_some(), Ordering::Relaxed);
        match (&self.instance, told) {
            (Some(expected), Some(told)) if told != expected.as_str() => Err(FetchError::Replaced),
            _ => Ok(answer),
        }
    }
}

fn found(answer: Response) -> Result<Option<Response>, FetchError> {
    match answer.status() {
        StatusCode::OK => Ok(Some(answer)),
        StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::GONE => Ok(None),
        status => Err(FetchError::Status(status.as_u16())),
    }
}

/// Whether a URL names this host by loopback.
fn is_loopback(url: &str) -> bool {
    let host = reqwest::Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned));
    let host = host.as_deref().unwrap_or_default().trim_matches(['[', ']']);
    let is_loopback = |address: std::net::IpAddr| address.to_canonical().is_loopback();
    host == "localhost" || host.parse().is_ok_and(is_loopback)
}

/// Where a part begins, as `Content-Range: bytes 5-9/10` says.
fn begins_at(answer: &Response) -> Option<u64> {
    let range = answer.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

/// Reads a whole body of at most `limit` bytes.
async fn body(mut answer: Response, limit: usize) -> Result<Bytes, FetchError> {
    let len = answer.content_length().and_then(|len| usize::try_from(len).ok()).unwrap_or_default();
    let mut bytes = BytesMut::with_capacity(len.min(limit));
    while let Some(chunk) = answer.chunk().await.map_err(to_error)? {
        if bytes.len() + chunk.len() > limit {
            return Err(FetchError::TooLarge(limit as u64));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

/// Asks by datagram, again and again until the caller's deadline. Answers name no question, so each has its own socket.
async fn has_path(address: SocketAddr, hash: &StorePathHash) -> Result<bool, FetchError> {
    let failed = |error: std::io::Error| io_error(&error);
    let local: SocketAddr = if address.is_ipv4() { ([0u8; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = tokio::net::UdpSocket::bind(local).await.map_err(failed)?;
    socket.connect(address).await.map_err(failed)?;
    let question = Message::HasPath(*hash).to_datagram();
    let (mut pause, mut buffer) = (FIRST_RESEND, [0; MAX_DATAGRAM]);
    loop {
        socket.send(&question).await.map_err(failed)?;
        if let Ok(received) = timeout(pause, socket.recv(&mut buffer)).await {
            let len = received.map_err(failed)?;
            match buffer.get(..len).and_then(Message::parse) {
                Some(Message::Yes) => return Ok(true),
                Some(Message::NotFound) => return Ok(false),
                _ => {}
            }
        }
        pause *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_known_by_its_url() {
        for (url, expected) in [
            ("http://127.0.0.2:9999/nix-cache", true),
            ("http://[::1]:9999/nix-cache", true),
            ("http://[::ffff:127.0.0.1]/", true),
            ("http://localhost:1", true),
            ("http://10.0.0.1:9999/nix-cache", false),
            ("http://[fe80::1]:9999/nix-cache", false),
            ("http://peer.invalid", false),
        ] {
            assert_eq!(is_loopback(url), expected, "{url}");
        }
    }
}
