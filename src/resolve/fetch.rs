//! One piece of a NAR on its way from one peer.
//!
//! Gives exactly the bytes that were asked for, or says what is wrong: knows nothing of other pieces and other peers.

use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::download_error::DownloadError;
use super::pace::Pace;
use crate::peer::{Arriving, FetchError, PeerClient};

/// A piece that is asked of a peer.
pub(super) struct Fetch {
    /// The number of the source.
    pub(super) source: usize,
    client: PeerClient,
    path: String,
    at: u64,
    end: u64,
    stall: Duration,
    pace: Pace,
    arriving: Option<Arriving>,
    /// When the latest wait for the peer began.
    pub(super) waits_since: Instant,
}

/// Why a piece did not come.
pub(super) enum Failed {
    /// The peer sends all or nothing: this is all, from its beginning on.
    NoRanges(Box<Arriving>),
    /// Anything else.
    Download(DownloadError),
}

impl From<DownloadError> for Failed {
    fn from(error: DownloadError) -> Self {
        Self::Download(error)
    }
}

impl From<FetchError> for Failed {
    fn from(error: FetchError) -> Self {
        Self::Download(error.into())
    }
}

impl Fetch {
    pub(super) fn new(
        source: usize,
        client: PeerClient,
        path: String,
        range: Range<u64>,
        stall: Duration,
        downloads: u32,
    ) -> Self {
        Self {
            source,
            client,
            path,
            at: range.start,
            end: range.end,
            stall,
            pace: Pace::new(stall, downloads),
            arriving: None,
            waits_since: Instant::now(),
        }
    }

    /// How long the peer was waited for in all.
    pub(super) fn all_waits(&self) -> Duration {
        self.pace.all_waits
    }

    /// The next bytes: at least one of them, and none beyond the end of the piece. To be asked no more after those.
    pub(super) async fn next(mut self) -> (Self, Result<Bytes, Failed>) {
        let result = self.chunk().await;
        (self, result)
    }

    async fn chunk(&mut self) -> Result<Bytes, Failed> {
        self.waits_since = Instant::now();
        let arriving = match &mut self.arriving {
            Some(arriving) => arriving,
            None => {
                let asked = self.client.part(&self.path, self.at..self.end, self.stall).await?;
                self.pace.all_waits += self.waits_since.elapsed();
                let arriving = asked.ok_or(DownloadError::NotThere)?;
                if !arriving.is_part {
                    return Err(Failed::NoRanges(Box::new(arriving)));
                }
                let expected = self.end - self.at;
                if let Some(got) = arriving.remaining().filter(|remaining| *remaining != expected) {
                    return Err(DownloadError::Length { got, expected }.into());
                }
                self.arriving.insert(arriving)
            }
        };
        let left = self.end - self.at;
        let chunk = self.pace.next(arriving).await?;
        match chunk.filter(|chunk| chunk.len() as u64 <= left) {
            Some(chunk) => {
                self.at += chunk.len() as u64;
                Ok(chunk)
            }
            None => Err(DownloadError::Length { got: self.at, expected: self.end }.into()),
        }
    }
}
