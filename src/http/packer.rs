//! What packs a piece: zstd, with memory that is used again.

use std::{fmt, io};

use bytes::Bytes;
use zstd::bulk::Compressor;
use zstd::zstd_safe::compress_bound;

/// What one thread packs with.
pub(super) struct Packer {
    compressor: Compressor<'static>,
    frame: Vec<u8>,
}

impl Packer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { compressor: Compressor::new(0)?, frame: Vec::new() })
    }

    /// Makes a frame of zstd.
    pub(super) fn pack(&mut self, level: i32, bytes: &[u8]) -> io::Result<Bytes> {
        self.compressor.set_compression_level(level)?;
        self.frame.clear();
        self.frame.reserve(compress_bound(bytes.len()));
        self.compressor.compress_to_buffer(bytes, &mut self.frame)?;
        // Copied, so that it takes no more memory than it is long.
        Ok(Bytes::copy_from_slice(&self.frame))
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}
