//! The bytes of a NAR in their order, into a spool, verified on their way.
//!
//! Knows nothing of who sends them. The invariants: the last bytes are given out only after length and hash have proven right,
//! and of a NAR that is verified first none before; what comes once more has to begin with what was given out.

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;

use super::download_error::DownloadError;
use crate::cache::{Deserted, SpoolWriter};
use crate::nix::NarHash;
use crate::store::{Buffer, BufferPool};

/// From so many bytes on a NAR goes on in long buffers, if as many may wait in memory: its first bytes should not wait for one to be
/// full, and where memory is scarce two of them would be more than all that waits.
const LONG_FROM: u64 = 1024 * 1024;
/// So much of the end is given out only when all has proven right, in bytes.
const KEPT_BACK: u64 = 64 * 1024;

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
    /// Bytes behind those, not hashed yet. They are copied, so that the buffer that they came in is free for the next ones: otherwise
    /// each takes a new one, and the allocator keeps twice what is needed.
    filling: Option<Buffer>,
    buffers: BufferPool,
    may_be_long: bool,
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
            may_be_long: writer.window() >= LONG_FROM,
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
            let (left, is_long) = (self.nar_size - self.got, self.may_be_long && self.got >= LONG_FROM);
            let buffer = self.filling.get_or_insert_with(|| self.buffers.empty(left, is_long));
            self.got += buffer.take_from(&mut chunk) as u64;
            if let Some(full) = self.filling.take_if(|buffer| buffer.is_full()) {
                self.hold(full.into_bytes()).await?;
            }
        }
        Ok(())
    }

    /// Hashes and holds the next bytes, and gives out those before, but for the end.
    async fn hold(&mut self, bytes: Bytes) -> Result<(), DownloadError> {
        let behind = self.nar_size - (self.got - bytes.len() as u64);
        if !self.whole && behind >= KEPT_BACK {
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::cache::{Begin, SpoolReader, Spools};

    const KIB: usize = 1024;

    fn nar(len: usize) -> Vec<u8> {
        fastrand::seed(len as u64);
        std::iter::repeat_with(|| fastrand::u8(..)).take(len).collect()
    }

    async fn begin(nar: &[u8], memory: u64, whole: bool) -> (Verified, SpoolReader) {
        let nar_hash = NarHash::from_digest(Sha256::digest(nar).into());
        let spools = Spools::new(None, memory, 0);
        let Begin::Write(writer, reader) = spools.begin(&nar_hash, nar.len() as u64, whole).await else {
            panic!("it is not there yet")
        };
        (Verified::new(nar_hash, whole, writer, BufferPool::default()), reader)
    }

    async fn take(verified: &mut Verified, bytes: &[u8], chunk: usize) -> Result<(), DownloadError> {
        for chunk in bytes.chunks(chunk) {
            verified.take(Bytes::copy_from_slice(chunk)).await?;
        }
        Ok(())
    }

    /// What was given out and not read yet.
    fn given_out(reader: &mut SpoolReader) -> Vec<u8> {
        let mut read = Vec::new();
        while let Some(Ok(Some(piece))) = reader.piece().now_or_never() {
            read.extend_from_slice(&piece.read().unwrap());
        }
        read
    }

    /// The locks of a spool are shuttle's in these tests.
    fn run<T: Future<Output = ()> + 'static>(test: fn() -> T) {
        let mut config = shuttle::Config::new();
        config.stack_size = 1 << 20;
        config.max_steps = shuttle::MaxSteps::None;
        let scheduler = shuttle::scheduler::RandomScheduler::new(1);
        shuttle::Runner::new(scheduler, config).run(move || shuttle::future::block_on(test()));
    }

    #[test]
    fn the_end_is_given_out_when_all_is_proven_and_not_before() {
        run(the_end_is_kept_back);
    }

    async fn the_end_is_kept_back() {
        let (short, mib) = (64 * KIB, 1024 * KIB);
        for len in [1, short - 1, short, short + 8, mib - 1, mib + 1, mib + 256 * KIB + 8, 3 * mib + 100] {
            for (chunk, memory, whole) in [
                (700, 64 * mib, false),
                (70_000, 64 * mib, true),
                (70_000, 256 * KIB, false),
                (600_000, 64 * mib, false),
            ] {
                let nar = nar(len);
                let (mut verified, mut reader) = begin(&nar, memory as u64, whole).await;
                take(&mut verified, &nar, chunk).await.unwrap();
                assert_eq!(verified.got(), len as u64);
                let mut read = given_out(&mut reader);
                assert!(nar.starts_with(&read), "{len} in chunks of {chunk}");
                let most = if whole { 0 } else { len.saturating_sub(short) };
                assert!(read.len() <= most && (whole || len < 8 * short || read.len() > len / 2), "{len}");
                verified.prove().await.unwrap();
                verified.finish();
                read.extend(given_out(&mut reader));
                assert!(read == nar, "{len} in chunks of {chunk}");
            }
        }
    }

    #[test]
    fn what_comes_once_more_is_not_mixed_with_what_came_before() {
        run(it_comes_once_more);
    }

    async fn it_comes_once_more() {
        let nar = nar(3_000_000);
        for came in [100, 70_000, 900_000, 2_000_000, 2_999_999] {
            for chunk in [5000, 400_000] {
                let (mut verified, mut reader) = begin(&nar, 1 << 26, false).await;
                take(&mut verified, &nar[..came], chunk).await.unwrap();
                verified.begin_anew();
                take(&mut verified, &nar, 300_001).await.unwrap();
                verified.prove().await.unwrap();
                verified.finish();
                assert!(given_out(&mut reader) == nar, "{came} in chunks of {chunk}");

                let (mut verified, _reader) = begin(&nar, 1 << 26, false).await;
                take(&mut verified, &nar[..came], chunk).await.unwrap();
                let is_begun = verified.is_begun();
                verified.begin_anew();
                let mut other = nar.clone();
                other[0] ^= 1;
                let taken = take(&mut verified, &other, chunk).await;
                assert_eq!(matches!(taken, Err(DownloadError::GivenOut)), is_begun, "{came}");
                assert!(is_begun || matches!(verified.prove().await, Err(DownloadError::Hash)));
            }
        }
    }
}
