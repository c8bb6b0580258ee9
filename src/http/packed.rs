//! A body packed as zstd while it is sent.
//!
//! Packs ahead of the socket by a few pieces, on threads where that may block. The invariant: the frame ends only if the body
//! did, and the end of the body is told in words: what breaks off midway, for whatever reason, never looks complete.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tracing::Instrument as _;
use zstd::stream::raw::{CParameter, Encoder, InBuffer, Operation as _, OutBuffer};

use super::compressors::Packing;
use crate::metrics::HttpMetrics;

/// Pieces that are packed ahead of the socket.
const AHEAD: usize = 4;
/// How far back a frame refers, at most, as a power of two: 1 MiB, which costs level 3 next to nothing and both sides half the
/// memory.
const LARGEST_WINDOW: u32 = 20;
/// The longest block of zstd, in bytes.
const BLOCK: usize = 128 * 1024;

/// Why a body was cut short.
#[derive(Debug, Error)]
enum PackError {
    /// What was to be packed failed.
    #[error("{0}")]
    Source(Box<dyn Error + Send + Sync>),
    /// zstd failed; or more or fewer bytes came than were announced.
    #[error("can't be packed: {0}")]
    Zstd(#[from] io::Error),
    /// The daemon stops.
    #[error("the daemon stops")]
    Stopped,
}

/// What goes to the socket; the end is a value too.
enum Piece {
    Bytes(Bytes),
    End,
}

/// The body of `len` bytes that `source` gives, packed. Without a packing it is a frame of zstd that holds the bytes as they
/// are, and takes no memory.
pub(super) fn packed<S, E>(source: S, len: u64, packing: Option<Packing>, metrics: &Arc<HttpMetrics>) -> Body
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Error + Send + Sync + 'static,
{
    let (sender, pieces) = mpsc::channel(AHEAD);
    let metrics = Arc::clone(metrics);
    let pump = async move {
        let end = pump(source, len, packing, &sender, &metrics).await;
        // Nobody may be there to hear it: the client left.
        let _ = sender.send(end.map(|()| Piece::End)).await;
    };
    tokio::spawn(pump.in_current_span());
    Body::from_stream(futures_util::stream::try_unfold(pieces, |mut pieces| async move {
        match pieces.recv().await {
            Some(Ok(Piece::Bytes(bytes))) => Ok(Some((bytes, pieces))),
            Some(Ok(Piece::End)) => Ok(None),
            Some(Err(error)) => Err(error),
            None => Err(PackError::Stopped),
        }
    }))
}

/// Packs all of it. Also returns when nobody listens any more.
async fn pump<S, E>(
    source: S,
    len: u64,
    packing: Option<Packing>,
    to: &mpsc::Sender<Result<Piece, PackError>>,
    metrics: &Arc<HttpMetrics>,
) -> Result<(), PackError>
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Error + Send + Sync + 'static,
{
    let mut source = std::pin::pin!(source);
    let mut packer = Packer::new(packing, len)?;
    loop {
        let chunk = source.next().await.transpose().map_err(|error| PackError::Source(error.into()))?;
        let is_end = chunk.is_none();
        let input_bytes = chunk.as_ref().map_or(0, Bytes::len) as u64;
        let bytes;
        (packer, bytes) = packer.step(chunk).await?;
        metrics.packed(input_bytes, bytes.len() as u64);
        if !bytes.is_empty() && to.send(Ok(Piece::Bytes(bytes))).await.is_err() {
            return Ok(());
        }
        if is_end {
            return Ok(());
        }
    }
}

/// Makes one frame.
enum Packer {
    Zstd(Box<(Packing, Zstd)>),
    Stored(Stored),
}

impl Packer {
    fn new(packing: Option<Packing>, len: u64) -> io::Result<Self> {
        Ok(match packing {
            Some(packing) => {
                let zstd = Zstd::new(packing.level(), len)?;
                Self::Zstd(Box::new((packing, zstd)))
            }
            None => Self::Stored(Stored { left: len, has_begun: false }),
        })
    }

    /// Packs the next bytes, or the end.
    async fn step(self, chunk: Option<Bytes>) -> Result<(Self, Bytes), PackError> {
        match self {
            Self::Stored(mut stored) => {
                let bytes = stored.step(chunk)?;
                Ok((Self::Stored(stored), bytes))
            }
            Self::Zstd(mut both) => {
                let place = both.0.place().await.ok_or(PackError::Stopped)?;
                let packing = spawn_blocking(move || {
                    let (began, len) = (Instant::now(), chunk.as_ref().map_or(0, Bytes::len));
                    let bytes = both.1.step(chunk.as_deref());
                    let took: Duration = began.elapsed();
                    both.0.packed(len, took);
                    drop(place);
                    (both, bytes)
                });
                let (both, bytes) = packing.await.map_err(|_| PackError::Stopped)?;
                Ok((Self::Zstd(both), bytes?))
            }
        }
    }
}

struct Zstd {
    encoder: Encoder<'static>,
    packed: Vec<u8>,
}

impl Zstd {
    fn new(level: i32, len: u64) -> io::Result<Self> {
        let mut encoder = Encoder::new(level)?;
        if level > 1 {
            encoder.set_parameter(CParameter::WindowLog(LARGEST_WINDOW))?;
        }
        // The frame can't be ended before, then.
        encoder.set_pledged_src_size(Some(len))?;
        Ok(Self { encoder, packed: Vec::new() })
    }

    fn step(&mut self, chunk: Option<&[u8]>) -> io::Result<Bytes> {
        self.packed.clear();
        let mut input = InBuffer::around(chunk.unwrap_or_default());
        loop {
            self.packed.reserve(BLOCK);
            let at = self.packed.len();
            let mut output = OutBuffer::around_pos(&mut self.packed, at);
            let is_done = match chunk {
                Some(chunk) => {
                    self.encoder.run(&mut input, &mut output)?;
                    input.pos() == chunk.len() && output.pos() < output.capacity()
                }
                None => self.encoder.finish(&mut output, true)? == 0,
            };
            if is_done {
                return Ok(Bytes::copy_from_slice(&self.packed));
            }
        }
    }
}

/// A frame of blocks that are not packed (RFC 8878, 3.1.1).
struct Stored {
    left: u64,
    has_begun: bool,
}

impl Stored {
    /// The magic number; a frame header with a length of eight bytes and a window of one block.
    const HEADER: [u8; 6] = [0x28, 0xb5, 0x2f, 0xfd, 0b1100_0000, (17 - 10) << 3];

    fn step(&mut self, chunk: Option<Bytes>) -> io::Result<Bytes> {
        let mut bytes = Vec::with_capacity(chunk.as_ref().map_or(0, Bytes::len) + 64);
        if !std::mem::replace(&mut self.has_begun, true) {
            bytes.extend_from_slice(&Self::HEADER);
            bytes.extend_from_slice(&self.left.to_le_bytes());
        }
        let Some(chunk) = chunk else {
            // The last block is an empty one.
            bytes.extend_from_slice(&[1, 0, 0]);
            return if self.left == 0 { Ok(bytes.into()) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        };
        self.left = self.left.checked_sub(chunk.len() as u64).ok_or(io::ErrorKind::InvalidData)?;
        for block in chunk.chunks(BLOCK) {
            let header = (block.len() as u32) << 3;
            bytes.extend_from_slice(&header.to_le_bytes()[..3]);
            bytes.extend_from_slice(block);
        }
        Ok(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::compressors::Compressors;
    use super::*;
    use crate::metrics::Metrics;
    use futures_util::stream;
    use http_body::Body as _;
    use proptest::prelude::*;
    use std::pin::Pin;

    /// What a client gets, and whether it looks complete.
    async fn sent(
        chunks: Vec<Result<Vec<u8>, io::Error>>,
        len: u64,
        packing: Option<Packing>,
    ) -> (Vec<u8>, bool) {
        let source = stream::iter(chunks.into_iter().map(|chunk| chunk.map(Bytes::from)));
        let mut body = packed(source, len, packing, &Metrics::new().http);
        let mut all = Vec::new();
        loop {
            match std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
                Some(Ok(frame)) => all.extend_from_slice(frame.data_ref().unwrap()),
                Some(Err(_)) => return (all, false),
                None => return (all, true),
            }
        }
    }

    fn packing() -> Option<Packing> {
        Compressors::new(1).for_client("10.0.0.1".parse().unwrap())
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_chunks_come_out_as_one_frame(
            lens in proptest::collection::vec(1usize..300_000, 0..5),
            is_stored: bool,
            noise: u8,
        ) {
            let chunk = |len: usize| (0..len).map(|at| (at * at / 7) as u8 & noise).collect::<Vec<u8>>();
            let chunks: Vec<Vec<u8>> = lens.into_iter().map(chunk).collect();
            let all = chunks.concat();
            let packing = if is_stored { None } else { packing() };
            let given = chunks.into_iter().map(Ok).collect();
            let (bytes, is_whole) = run(sent(given, all.len() as u64, packing));
            prop_assert!(is_whole);
            prop_assert!(zstd::stream::decode_all(&bytes[..]).unwrap() == all);
        }
    }

    #[test]
    fn what_fails_is_short_or_long_never_looks_complete() {
        let chunk = || Ok(vec![7; 300_000]);
        let failure = || Err(io::Error::other("gone"));
        for stored in [true, false] {
            for (chunks, len) in [
                (vec![chunk(), failure()], 600_000),
                (vec![chunk()], 300_001),
                (vec![chunk(), chunk()], 599_999),
            ] {
                let packing = if stored { None } else { packing() };
                let (bytes, is_whole) = run(sent(chunks, len, packing));
                assert!(!is_whole);
                assert!(zstd::stream::decode_all(&bytes[..]).is_err(), "stored: {stored}");
            }
        }
    }
}
