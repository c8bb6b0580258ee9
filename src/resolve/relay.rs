//! A NAR that comes from a peer, verified on its way.
//!
//! The invariant: the last bytes leave only after length and hash have proven right. A small NAR is fetched whole and
//! verified before its first byte is sent; a large one is hashed while it streams, and a wrong one is cut.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::Stream;
use reqwest::Response;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::cache::{Origin, PeerCache, Served};
use crate::nix::cache_url::NarUrl;
use crate::nix::{NarHash, StorePathHash};
use crate::peer::{FetchError, PeerId, Peers, to_error};

use super::hashing::Hashing;
use super::lookup::{Lookup, Sought};

/// How many peers are tried for one NAR before it is given up.
const TRIES: usize = 4;

/// Chunks of a NAR that were received and hashed, and wait to be sent.
const AHEAD: usize = 8;

/// Why a NAR from a peer broke off.
#[derive(Debug, Error)]
pub enum RelayError {
    /// The peer could not be asked, or broke off.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// More or fewer bytes than NarSize.
    #[error("the peer sent {got} bytes of a NAR of {expected}")]
    Length {
        /// How many came.
        got: u64,
        /// NarSize.
        expected: u64,
    },
    /// Other bytes than those that were signed.
    #[error("the peer sent other bytes than those of NarHash")]
    Hash,
}

/// A NAR that a peer has begun to send.
pub struct RelayedNar {
    /// Length in bytes.
    pub nar_size: u64,
    /// SHA-256.
    pub nar_hash: NarHash,
    body: Begun,
}

enum Begun {
    /// Verified already, in the pieces in which it came.
    Whole(VecDeque<Bytes>),
    Streaming(mpsc::Receiver<Result<Bytes, RelayError>>),
}

/// Fetches NARs from peers. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Relays {
    peers: Peers,
    cache: PeerCache,
    lookup: Lookup,
    verify_first: u64,
    stall: Duration,
}

impl Relays {
    pub(super) fn new(
        peers: Peers,
        cache: PeerCache,
        lookup: Lookup,
        verify_first: u64,
        stall: Duration,
    ) -> Self {
        Self { peers, cache, lookup, verify_first, stall }
    }

    /// Begins to fetch a NAR. `None`: no peer has it, or none that has it can be believed.
    pub(super) async fn nar(&self, url: &NarUrl) -> Option<RelayedNar> {
        let mut tried = Vec::new();
        while tried.len() < TRIES {
            let (peer, served) = self.holder(url, &tried).await?;
            match self.begin(&peer, &url.hash, &served).await {
                Ok(Some(nar)) => return Some(nar),
                Ok(None) => tracing::debug!(peer.id = %peer, "a peer has the narinfo and not the NAR"),
                Err(error) => self.blame(&peer, &error),
            }
            self.lookup.forget(&url.hash, &peer);
            tried.push(peer);
        }
        None
    }

    /// The peer that served the narinfo, or whoever has it now, but for those that were tried.
    async fn holder(&self, url: &NarUrl, tried: &[PeerId]) -> Option<(PeerId, Served)> {
        // A peer that is away is still remembered; it is asked again when it is back.
        let is_there =
            |peer: &PeerId| self.peers.get(peer).is_some_and(|peer| !peer.is_paused(Instant::now()));
        let remembered = || {
            let served = self.cache.get(&url.hash)?;
            let Origin::Peer(peer) = &served.origin else { return None };
            let fits = url.nar_hash.is_none_or(|wanted| wanted == served.nar_hash);
            (fits && !tried.contains(peer) && is_there(peer)).then(|| (peer.clone(), served.clone()))
        };
        if let Some(found) = remembered() {
            return Some(found);
        }
        let sought = Sought { hash: url.hash, nar_hash: url.nar_hash, without: tried.to_vec() };
        self.lookup.find(sought).await?;
        remembered()
    }

    async fn begin(
        &self,
        peer: &PeerId,
        hash: &StorePathHash,
        served: &Served,
    ) -> Result<Option<RelayedNar>, RelayError> {
        let Some(known) = self.peers.get(peer) else { return Ok(None) };
        let began = Instant::now();
        let answer = self.peers.client(&known)?.file(&served.nar_path, self.stall).await?;
        let Some(answer) = answer else { return Ok(None) };
        if let Some(len) = answer.content_length().filter(|len| *len != served.nar_size) {
            return Err(RelayError::Length { got: len, expected: served.nar_size });
        }
        let mut relay = Relay {
            answer,
            hashing: Some(Hashing::begin(served.nar_size)),
            got: 0,
            held: Bytes::new(),
            expected: served.clone(),
            began,
            relays: self.clone(),
            peer: peer.clone(),
            hash: *hash,
            _in_flight: self.peers.began(peer),
        };
        let (nar_size, nar_hash) = (served.nar_size, served.nar_hash);
        let body = if nar_size <= self.verify_first {
            let mut whole = VecDeque::new();
            while let Some(chunk) = relay.next_chunk().await? {
                whole.push_back(chunk);
            }
            Begun::Whole(whole)
        } else {
            // Received and hashed beside the sending: on the way through a host each byte is waited for only once.
            let (chunks, receiver) = mpsc::channel(AHEAD);
            tokio::spawn(relay.pump(chunks));
            Begun::Streaming(receiver)
        };
        Ok(Some(RelayedNar { nar_size, nar_hash, body }))
    }

    fn blame(&self, peer: &PeerId, error: &RelayError) {
        match error {
            RelayError::Fetch(error) => self.peers.failed(peer, error, self.stall),
            RelayError::Length { .. } | RelayError::Hash => self.peers.lied(peer, &error.to_string()),
        }
    }
}

impl RelayedNar {
    /// The bytes. A failure midway is an error and never an end.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, RelayError>> + Send {
        let (whole, chunks) = match self.body {
            Begun::Whole(pieces) => (pieces, None),
            Begun::Streaming(chunks) => (VecDeque::new(), Some(chunks)),
        };
        let left = self.nar_size;
        futures_util::stream::try_unfold((whole, chunks, left), move |(mut whole, chunks, left)| async move {
            if left == 0 {
                return Ok(None);
            }
            if let Some(piece) = whole.pop_front() {
                let left = left.saturating_sub(piece.len() as u64);
                return Ok(Some((piece, (whole, chunks, left))));
            }
            let expected = self.nar_size;
            let broken = || RelayError::Length { got: expected - left, expected };
            // A channel that closes is no end: only all the bytes are.
            let mut chunks = chunks.ok_or_else(broken)?;
            let chunk = chunks.recv().await.ok_or_else(broken)??;
            let left = left.saturating_sub(chunk.len() as u64);
            Ok(Some((chunk, (whole, Some(chunks), left))))
        })
    }
}

/// A NAR on its way.
struct Relay {
    answer: Response,
    /// Until it is finished.
    hashing: Option<Hashing>,
    got: u64,
    /// Bytes that came and were not given out: the end of the NAR may be among them.
    held: Bytes,
    expected: Served,
    began: Instant,
    relays: Relays,
    peer: PeerId,
    hash: StorePathHash,
    _in_flight: crate::peer::InFlight,
}

impl Relay {
    /// Receives and hashes until the end, a failure, or nobody listens any more.
    async fn pump(mut self, chunks: mpsc::Sender<Result<Bytes, RelayError>>) {
        loop {
            let next = match self.next_chunk().await {
                Ok(Some(chunk)) => Ok(chunk),
                Ok(None) => return,
                Err(error) => {
                    self.relays.blame(&self.peer, &error);
                    self.relays.lookup.forget(&self.hash, &self.peer);
                    Err(error)
                }
            };
            let is_over = next.is_err();
            if chunks.send(next).await.is_err() || is_over {
                return;
            }
        }
    }

    /// The next bytes; always one chunk behind the peer, so that the last ones wait for the proof.
    async fn next_chunk(&mut self) -> Result<Option<Bytes>, RelayError> {
        while self.got < self.expected.nar_size {
            let stall = self.relays.stall;
            let next = timeout(stall, self.answer.chunk()).await.map_err(|_| FetchError::Timeout(stall))?;
            let Some(chunk) = next.map_err(to_error)? else {
                return Err(RelayError::Length { got: self.got, expected: self.expected.nar_size });
            };
            if chunk.is_empty() {
                continue;
            }
            self.got += chunk.len() as u64;
            if self.got > self.expected.nar_size {
                return Err(RelayError::Length { got: self.got, expected: self.expected.nar_size });
            }
            if let Some(hashing) = &mut self.hashing {
                hashing.update(&chunk).await;
            }
            let before = std::mem::replace(&mut self.held, chunk);
            if self.got == self.expected.nar_size {
                self.prove().await?;
            }
            if !before.is_empty() {
                return Ok(Some(before));
            }
        }
        let last = std::mem::take(&mut self.held);
        Ok((!last.is_empty()).then_some(last))
    }

    async fn prove(&mut self) -> Result<(), RelayError> {
        let hash = match self.hashing.take() {
            Some(hashing) => hashing.finish().await,
            None => None,
        };
        if hash != Some(self.expected.nar_hash) {
            return Err(RelayError::Hash);
        }
        self.relays.peers.delivered(&self.peer, self.got, self.began.elapsed());
        Ok(())
    }
}
