//! zstd on its way from a peer, unpacked piece by piece.
//!
//! Knows nothing of what is in it. The invariants: a piece is bounded however much the bytes would unpack to, since no more is
//! unpacked than is asked for, and so is the memory, since a window that is larger than ours ever are is refused.

use std::io;

use bytes::{Buf as _, Bytes};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

/// How far back a peer's zstd may refer, as a power of two: 1 MiB, as far as that of any peernix does.
const LARGEST_WINDOW: u32 = 20;
/// The longest piece, in bytes.
const PIECE: usize = 256 * 1024;

/// Unpacks one stream: one frame of zstd or several.
pub(super) struct Unpacker {
    decoder: Decoder<'static>,
    /// What came and is not unpacked yet.
    input: Bytes,
    piece: Vec<u8>,
    /// The latest piece was full: the decoder may hold more.
    is_full: bool,
    /// All that came makes whole frames.
    is_whole: bool,
}

impl Unpacker {
    pub(super) fn new() -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(LARGEST_WINDOW))?;
        let piece = Vec::with_capacity(PIECE);
        Ok(Self { decoder, input: Bytes::new(), piece, is_full: false, is_whole: true })
    }

    /// Takes the next bytes; those before have to be unpacked.
    pub(super) fn take(&mut self, packed: Bytes) {
        self.input = packed;
    }

    /// The next piece, never an empty one; `None`: more has to come first.
    pub(super) fn piece(&mut self) -> io::Result<Option<Bytes>> {
        while self.is_full || !self.input.is_empty() {
            self.piece.clear();
            let mut input = InBuffer::around(&self.input);
            let mut output = OutBuffer::around(&mut self.piece);
            let to_come = self.decoder.run(&mut input, &mut output)?;
            let read = input.pos();
            self.input.advance(read);
            self.is_whole = to_come == 0;
            self.is_full = !self.is_whole && self.piece.len() == self.piece.capacity();
            if self.piece.len() >= PIECE / 8 * 7 {
                let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
                return Ok(Some(piece.into()));
            }
            if !self.piece.is_empty() {
                // Copied, so that a short piece takes no more memory than it is long.
                return Ok(Some(Bytes::copy_from_slice(&self.piece)));
            }
        }
        Ok(None)
    }

    /// Whether what came may end here.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").field("is_whole", &self.is_whole).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unpack(packed: &[u8], step: usize) -> io::Result<(Vec<u8>, bool)> {
        let (mut unpacker, mut all) = (Unpacker::new()?, Vec::new());
        for part in packed.chunks(step) {
            unpacker.take(Bytes::copy_from_slice(part));
            while let Some(piece) = unpacker.piece()? {
                assert!(!piece.is_empty() && piece.len() <= PIECE);
                all.extend_from_slice(&piece);
            }
        }
        Ok((all, unpacker.is_whole()))
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_back_in_pieces_of_any_length(
            parts in proptest::collection::vec(proptest::collection::vec(0u8..4, 0..5000), 1..4),
            step in 1usize..3000,
        ) {
            let frames = parts.iter().flat_map(|part| zstd::bulk::compress(part, 1).unwrap());
            let packed: Vec<u8> = frames.collect();
            let (all, is_whole) = unpack(&packed, step).unwrap();
            prop_assert!(is_whole && all == parts.concat());
            let (_, is_whole) = unpack(&packed[..packed.len() - 1], step).unwrap();
            prop_assert!(!is_whole);
        }

        #[test]
        fn any_bytes_are_refused_or_bounded(bytes: Vec<u8>, step in 1usize..100) {
            let _ = unpack(&bytes, step);
            let frame = [&[0x28, 0xb5, 0x2f, 0xfd][..], &bytes].concat();
            let _ = unpack(&frame, step);
        }
    }

    #[test]
    fn a_bomb_comes_piece_by_piece_and_a_huge_window_is_refused() {
        let zeros = vec![0; 64 << 20];
        let bomb = zstd::bulk::compress(&zeros, 1).unwrap();
        let mut unpacker = Unpacker::new().unwrap();
        unpacker.take(bomb.into());
        assert_eq!(unpacker.piece().unwrap().unwrap().len(), PIECE);
        let mut packer = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        packer.window_log(27).unwrap();
        io::Write::write_all(&mut packer, &zeros).unwrap();
        assert!(unpack(&packer.finish().unwrap(), 4096).is_err());
    }

    #[test]
    fn what_is_kept_takes_about_as_much_memory_as_it_is_long() {
        let mut state = 1u64;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // About as compressible as a program.
            (state >> 60) as u8
        });
        let all: Vec<u8> = noise.take(4 << 20).collect();
        let packed: Vec<u8> =
            all.chunks(PIECE).flat_map(|piece| zstd::bulk::compress(piece, 1).unwrap()).collect();
        for step in [8 * 1024, 64 * 1024] {
            let (mut unpacker, mut memory) = (Unpacker::new().unwrap(), 0);
            for part in packed.chunks(step) {
                unpacker.take(Bytes::copy_from_slice(part));
                while let Some(piece) = unpacker.piece().unwrap() {
                    memory += piece.try_into_mut().unwrap().capacity();
                }
            }
            assert!(memory < all.len() * 5 / 4, "step {step}: {memory} for {}", all.len());
        }
    }
}
