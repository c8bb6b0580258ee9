//! A file on its way from a peer: the bytes of the file itself, packed or not on the wire.
//!
//! Tells the link what it carries. Knows nothing of what the bytes are good for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;
use reqwest::Response;
use reqwest::header::CONTENT_ENCODING;
use tokio::time::timeout;

use super::fetch_error::{FetchError, to_error};
use super::link::{Form, Link};
use super::unpack::Unpacker;

/// Who takes longer between two pieces finds the socket's buffer full of bytes that say nothing of the link's speed.
const PAUSE: Duration = Duration::from_millis(5);
/// A wait of this length shows that the buffer was empty.
const EMPTY: Duration = Duration::from_micros(200);
/// How long the end of a body may take behind the last byte of the file.
const END_TIME: Duration = Duration::from_secs(1);
/// In how many pieces it may come: of a frame's end and of the body's.
const END_PIECES: usize = 3;

/// The way to a peer, measured. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    link: Arc<Mutex<Link>>,
    /// Bytes of files as they came.
    wire_bytes: Counter,
}

impl Measured {
    pub(super) fn new(wire_bytes: Counter) -> Self {
        Self { link: Arc::new(Mutex::new(Link::new())), wire_bytes }
    }

    pub(super) fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file on its way.
#[derive(Debug)]
pub struct Arriving {
    answer: Response,
    unpacker: Option<Box<Unpacker>>,
    /// Where in the file it begins.
    pub offset: u64,
    /// Whether it is the part that was asked for, and not the whole.
    pub is_part: bool,
    measured: Measured,
    /// When the latest piece was given, if one was.
    given: Option<Instant>,
    /// What comes next may have waited here for us.
    is_piled_up: bool,
}

/// A wait that counts for the link, however it ends.
struct Wait<'a> {
    measured: &'a Measured,
    form: Form,
    came: u64,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.measured.link().came(self.form, self.came, Instant::now());
    }
}

impl Arriving {
    /// What an answer brings: the part from there on, or all. One that is packed in a way that nobody asked for is refused.
    pub(super) fn new(
        answer: Response,
        part: Option<u64>,
        may_be_packed: bool,
        measured: Measured,
    ) -> Result<Self, FetchError> {
        let encoding = answer.headers().get(CONTENT_ENCODING).map(|encoding| encoding.as_bytes());
        let unpacker = match encoding {
            None | Some(b"identity") => None,
            Some(b"zstd") if may_be_packed => {
                let made = Unpacker::new().map_err(|error| FetchError::Request(error.to_string()))?;
                Some(Box::new(made))
            }
            Some(_) => {
                return Err(FetchError::Encoding("the body is packed in a way that was not asked for"));
            }
        };
        let (offset, is_part) = (part.unwrap_or_default(), part.is_some());
        Ok(Self { answer, unpacker, offset, is_part, measured, given: None, is_piled_up: false })
    }

    /// How many bytes are to come, if the peer said so.
    #[must_use]
    pub fn remaining(&self) -> Option<u64> {
        // What is announced of a packed body is the length on the wire.
        self.answer.content_length().filter(|_| self.unpacker.is_none())
    }

    /// The next bytes, never none of them; `None` at the end. May be dropped midway.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, FetchError> {
        let form = if self.unpacker.is_some() { Form::Packed } else { Form::Plain };
        let began = Instant::now();
        self.is_piled_up |= self.given.is_some_and(|given| began - given > PAUSE);
        // The first bytes took the peer's time to find them, too.
        let counts = self.given.is_some() && !self.is_piled_up;
        let measured = self.measured.clone();
        let mut wait = counts.then(|| {
            measured.link().waits(form, began);
            Wait { measured: &measured, form, came: 0 }
        });
        let chunk = self.next().await?;
        let len = chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
        if let Some(wait) = &mut wait {
            wait.came = len;
        }
        drop(wait);
        let now = Instant::now();
        self.is_piled_up &= now - began < EMPTY;
        self.given = Some(now);
        Ok(chunk)
    }

    async fn next(&mut self) -> Result<Option<Bytes>, FetchError> {
        loop {
            if let Some(unpacker) = &mut self.unpacker {
                let piece =
                    unpacker.piece().map_err(|_| FetchError::Encoding("the body is not zstd throughout"))?;
                if piece.is_some() {
                    return Ok(piece);
                }
            }
            let Some(chunk) = self.answer.chunk().await.map_err(to_error)? else {
                let is_whole = self.unpacker.as_ref().is_none_or(|unpacker| unpacker.is_whole());
                return if is_whole {
                    Ok(None)
                } else {
                    Err(FetchError::Encoding("the body ends within a frame of zstd"))
                };
            };
            self.measured.wire_bytes.inc_by(chunk.len() as u64);
            match &mut self.unpacker {
                Some(unpacker) => unpacker.take(chunk),
                None if chunk.is_empty() => {}
                None => return Ok(Some(chunk)),
            }
        }
    }

    /// Nothing more of the file is to come. Of a packed body, whose length nobody knows, the end is still read, besides, so that the
    /// connection can serve the next request.
    pub fn finish(mut self) {
        if self.unpacker.is_some() {
            tokio::spawn(timeout(END_TIME, async move {
                // What else comes is not taken: then the connection is closed.
                for _ in 0..END_PIECES {
                    if !matches!(self.answer.chunk().await, Ok(Some(_))) {
                        return;
                    }
                }
            }));
        }
    }
}
