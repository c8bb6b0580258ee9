//! A body packed as zstd while it is sent.
//!
//! Each piece is a frame of its own, so that several threads may pack one body, and none has to remember what went before. Packs
//! ahead of the socket by a few pieces, on threads where that may block. The invariant: the end of the body is told in words,
//! after exactly the bytes that were announced: what breaks off midway, for whatever reason, never looks complete. Who is told no
//! end gets one frame, unpacked, that has its length in front.

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use thiserror::Error;

use super::compressors::{AHEAD, Packing};
use crate::metrics::HttpMetrics;

/// The longest piece, in bytes: more would do little for the size, and less would cost some of it.
const PIECE: usize = 256 * 1024;
/// The longest block of zstd, in bytes.
const BLOCK: usize = 128 * 1024;

/// Why a body was cut short.
#[derive(Debug, Error)]
pub(super) enum PackError {
    /// What was to be packed failed.
    #[error("{0}")]
    Source(Box<dyn Error + Send + Sync>),
    /// More or fewer bytes came than were announced.
    #[error("can't be packed: it is longer or shorter than it was announced")]
    Length,
    /// zstd failed.
    #[error("can't be packed: {0}")]
    Zstd(#[from] io::Error),
    /// The daemon stops.
    #[error("the daemon stops")]
    Stopped,
}

/// The `len` bytes that `source` gives, packed. Without a packing they are put into one frame of zstd as they are; it has their
/// number in front.
pub(super) fn packed<S, E>(
    source: S,
    len: u64,
    packing: Option<Packing>,
    metrics: &Arc<HttpMetrics>,
) -> BoxStream<'static, Result<Bytes, PackError>>
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Error + Send + Sync + 'static,
{
    let source = source.map_err(|error| PackError::Source(error.into()));
    let source = Announced { source: source.boxed(), left: len };
    let metrics = Arc::clone(metrics);
    let Some(packing) = packing else {
        let mut stored = Stored { len, has_begun: false };
        let end = futures_util::stream::once(async { Ok(None) });
        let stored = source.map_ok(Some).chain(end).map_ok(move |chunk| {
            let bytes = stored.step(chunk.as_ref());
            metrics.packed(chunk.map_or(0, |chunk| chunk.len()) as u64, bytes.len() as u64);
            bytes
        });
        return stored.boxed();
    };
    let packing = Arc::new(packing);
    let frames = Pieces { source, gathered: BytesMut::new(), is_over: false }.map_ok(move |piece| {
        let (packing, metrics) = (Arc::clone(&packing), Arc::clone(&metrics));
        // A task, which takes the place that it waits for whether or not somebody reads on here.
        let task = tokio::spawn(async move {
            let input_bytes = piece.len() as u64;
            let frame = packing.pack(piece).await.ok_or(PackError::Stopped)??;
            metrics.packed(input_bytes, frame.len() as u64);
            Ok(frame)
        });
        async { task.await.map_err(|_| PackError::Stopped)? }
    });
    frames.try_buffered(AHEAD).boxed()
}

/// As many bytes as were announced, or an error.
struct Announced<S> {
    source: S,
    left: u64,
}

impl<S: Stream<Item = Result<Bytes, PackError>> + Unpin> Stream for Announced<S> {
    type Item = Result<Bytes, PackError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = match ready!(self.source.poll_next_unpin(context)) {
            Some(Ok(chunk)) => match self.left.checked_sub(chunk.len() as u64) {
                Some(left) => {
                    self.left = left;
                    Some(Ok(chunk))
                }
                None => Some(Err(PackError::Length)),
            },
            None if std::mem::take(&mut self.left) > 0 => Some(Err(PackError::Length)),
            end => end,
        };
        Poll::Ready(next)
    }
}

/// The same bytes in pieces, none shorter than half of [`PIECE`] but for the last one.
struct Pieces<S> {
    source: S,
    gathered: BytesMut,
    is_over: bool,
}

impl<S: Stream<Item = Result<Bytes, PackError>> + Unpin> Stream for Pieces<S> {
    type Item = Result<Bytes, PackError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while !self.is_over && self.gathered.len() < PIECE {
            match ready!(self.source.poll_next_unpin(context)) {
                Some(Ok(chunk)) if self.gathered.is_empty() && (PIECE / 2..=PIECE).contains(&chunk.len()) => {
                    return Poll::Ready(Some(Ok(chunk)));
                }
                Some(Ok(chunk)) => self.gathered.extend_from_slice(&chunk),
                Some(Err(error)) => {
                    self.is_over = true;
                    self.gathered.clear();
                    return Poll::Ready(Some(Err(error)));
                }
                None => self.is_over = true,
            }
        }
        let len = self.gathered.len().min(PIECE);
        let gathered = self.gathered.split_to(len).freeze();
        Poll::Ready((!gathered.is_empty()).then_some(Ok(gathered)))
    }
}

/// A frame of blocks that are not packed (RFC 8878, 3.1.1).
struct Stored {
    len: u64,
    has_begun: bool,
}

impl Stored {
    /// The magic number; a frame header with a length of eight bytes and a window of one block.
    const HEADER: [u8; 6] = [0x28, 0xb5, 0x2f, 0xfd, 0b1100_0000, (17 - 10) << 3];

    /// The next bytes, or the end.
    fn step(&mut self, chunk: Option<&Bytes>) -> Bytes {
        let mut bytes = Vec::with_capacity(chunk.map_or(0, Bytes::len) + 64);
        if !std::mem::replace(&mut self.has_begun, true) {
            bytes.extend_from_slice(&Self::HEADER);
            bytes.extend_from_slice(&self.len.to_le_bytes());
        }
        let Some(chunk) = chunk else {
            // The last block is an empty one.
            bytes.extend_from_slice(&[1, 0, 0]);
            return bytes.into();
        };
        for block in chunk.chunks(BLOCK) {
            let header = (block.len() as u32) << 3;
            bytes.extend_from_slice(&header.to_le_bytes()[..3]);
            bytes.extend_from_slice(block);
        }
        bytes.into()
    }
}

#[cfg(test)]
mod tests {
    use super::super::compressors::Compressors;
    use super::*;
    use crate::metrics::Metrics;
    use futures_util::stream;
    use proptest::prelude::*;

    /// What a client gets, and whether it looks complete.
    async fn sent(
        chunks: Vec<Result<Vec<u8>, io::Error>>,
        len: u64,
        packing: Option<Packing>,
    ) -> (Vec<u8>, bool) {
        let source = stream::iter(chunks.into_iter().map(|chunk| chunk.map(Bytes::from)));
        let mut packed = packed(source, len, packing, &Metrics::new().http);
        let mut all = Vec::new();
        while let Some(next) = packed.next().await {
            match next {
                Ok(bytes) => all.extend_from_slice(&bytes),
                Err(_) => return (all, false),
            }
        }
        (all, true)
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
        fn any_chunks_come_out_again(
            lens in proptest::collection::vec(1usize..300_000, 1..6),
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
                assert!(!is_whole, "stored: {stored}");
                let unpacked = zstd::stream::decode_all(&bytes[..]);
                // A frame of its own for each piece is whole; who gets those is told the end.
                assert!(if stored {
                    unpacked.is_err()
                } else {
                    unpacked.map_or(0, |all| all.len() as u64) < len
                });
            }
        }
    }

    /// Pieces that take very different times, by as many threads as there are.
    #[test]
    fn pieces_come_in_their_order_however_many_threads_pack_them() {
        let noise = |seed: u64, len: usize| {
            let mut state = seed;
            let step = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33) as u8
            };
            std::iter::repeat_with(step).take(len).collect::<Vec<u8>>()
        };
        let chunks: Vec<Vec<u8>> = (0..40)
            .map(|at| if at % 4 == 0 { noise(at, PIECE) } else { vec![at as u8; PIECE / 2] })
            .collect();
        let all = chunks.concat();
        let packing = Compressors::new(4).for_client("10.0.0.1".parse().unwrap());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        let given = chunks.into_iter().map(Ok).collect();
        let (bytes, is_whole) = runtime.block_on(sent(given, all.len() as u64, packing));
        assert!(is_whole && zstd::stream::decode_all(&bytes[..]).unwrap() == all);
    }
}
