//! The bytes of a NAR in their order, into a spool, verified on their way.
//!
//! Knows nothing of who sends them. The invariants: the last bytes are given out only after length and hash have proven right,
//! and of a NAR that is verified first none before; what comes once more has to begin with what was given out.

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;

use super::download::DownloadError;
use crate::cache::{Deserted, SpoolWriter};
use crate::nix::NarHash;
use crate::store::{Buffer, BufferPool};

/// From so many bytes on a NAR goes on in long buffers: the first bytes should not wait for one to be full.
const LONG_FROM: u64 = 1024 * 1024;

/// A NAR that is verified.
pub(super) struct Verified {
    nar_hash: NarHash,
    nar_size: u64,
    /// Whether nothing is given out before all of it is verified.
    whole: bool,
    writer: SpoolWriter,
    /// Of all bytes that came.
    hasher: Sha256,
    got: u64,
    /// The latest bytes, or all of them: what was not given out.
    held: Vec<Bytes>,
    /// Bytes behind those, not hashed yet. All are copied: a client's buffer that is free again at once is used again, where one that
    /// waits here for its turn would be one of many.
    filling: Option<Buffer>,
    buffers: BufferPool,
    /// How many bytes were given out, and the digest of those: what comes from another peer has to begin with the same.
    given: u64,
    given_digest: [u8; 32],
    /// Whether what comes is compared with what was given out before it goes on.
    is_repeated: bool,
}

impl Verified {
    pub(super) fn new(nar_hash: NarHash, whole: bool, writer: SpoolWriter, buffers: BufferPool) -> Self {
        Self {
            nar_hash,
            nar_size: writer.total(),
            whole,
            writer,
            hasher: Sha256::new(),
            got: 0,
            held: Vec::new(),
            filling: None,
            buffers,
            given: 0,
            given_digest: [0; 32],
            is_repeated: false,
        }
    }

    /// NarSize, in bytes.
    pub(super) fn nar_size(&self) -> u64 {
        self.nar_size
    }

    /// How many bytes came.
    pub(super) fn got(&self) -> u64 {
        self.got
    }

    /// Whether readers have some of it.
    pub(super) fn is_begun(&self) -> bool {
        self.given > 0
    }

    /// Waits until more may be taken. May be dropped midway.
    pub(super) async fn room(&self) -> Result<(), Deserted> {
        self.writer.room().await
    }

    /// All came and was proven.
    pub(super) fn finish(self) {
        self.writer.finish();
    }

    /// No more will come.
    pub(super) fn fail(self, why: impl std::fmt::Display) {
        self.writer.fail(why);
    }

    /// Takes the next bytes.
    pub(super) async fn take(&mut self, mut chunk: Bytes) -> Result<(), DownloadError> {
        let end = self.got + chunk.len() as u64;
        if end > self.nar_size {
            return Err(DownloadError::Length { got: end, expected: self.nar_size });
        }
        if self.is_repeated {
            return self.compare(chunk).await;
        }
        while !chunk.is_empty() {
            let (left, is_long) = (self.nar_size - self.got, self.got >= LONG_FROM);
            let buffer = self.filling.get_or_insert_with(|| self.buffers.empty(left, is_long));
            let taken = buffer.take_from(&mut chunk);
            self.got += taken as u64;
            if let Some(full) = self.filling.take_if(|buffer| buffer.is_full()) {
                self.hold(full.into_bytes()).await?;
            }
        }
        Ok(())
    }

    /// Hashes and holds the next bytes, and gives out those before.
    async fn hold(&mut self, bytes: Bytes) -> Result<(), DownloadError> {
        if !self.whole {
            self.give_out().await?;
        }
        self.hasher.update(&bytes);
        self.held.push(bytes);
        Ok(())
    }

    /// Takes bytes that were given out already: once more than all of those came, both have to be the same.
    async fn compare(&mut self, mut chunk: Bytes) -> Result<(), DownloadError> {
        let left = usize::try_from(self.given - self.got).unwrap_or(usize::MAX);
        let rest = if left < chunk.len() { chunk.split_off(left) } else { Bytes::new() };
        self.hasher.update(&chunk);
        self.got += chunk.len() as u64;
        if self.got < self.given {
            return Ok(());
        }
        if <[u8; 32]>::from(self.hasher.clone().finalize()) != self.given_digest {
            return Err(DownloadError::GivenOut);
        }
        self.is_repeated = false;
        if rest.is_empty() { Ok(()) } else { Box::pin(self.take(rest)).await }
    }

    /// Gives out all that is held. The hash so far is that of everything that was given out then.
    async fn give_out(&mut self) -> Result<(), DownloadError> {
        if self.held.is_empty() {
            return Ok(());
        }
        self.given += self.held.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        self.given_digest = self.hasher.clone().finalize().into();
        for bytes in std::mem::take(&mut self.held) {
            let appender = self.writer.appender();
            if self.writer.writes_to_disk() {
                spawn_blocking(move || appender.append(bytes)).await.map_err(|_| DownloadError::Stopped)?;
            } else {
                appender.append(bytes);
            }
        }
        Ok(())
    }

    /// Whether it is the NAR that was signed; gives out the last of it then.
    pub(super) async fn prove(&mut self) -> Result<(), DownloadError> {
        let digest = self.hasher.clone().finalize();
        if NarHash::from_digest(digest.into()) != self.nar_hash {
            return Err(DownloadError::Hash);
        }
        self.give_out().await
    }

    /// What came is not what was signed: all of it comes once more from others, and what was given out has to be its beginning.
    pub(super) fn begin_anew(&mut self) {
        self.hasher = Sha256::new();
        self.got = 0;
        self.held.clear();
        self.filling = None;
        self.is_repeated = self.given > 0;
    }
}
