//! How fast a peer has to send.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;

use crate::peer::{Arriving, FetchError};

/// A peer that sends fewer bytes a second than this is as good as one that stalls.
pub(super) const LOWEST_RATE: u64 = 256 * 1024;
/// What is not taken for a stall however many downloads share a link, in bytes a second.
const LEAST_SHARE: u64 = 8 * 1024;

/// Whether a peer sends fast enough: nothing for a while is too slow, and so is next to nothing for as long.
pub(super) struct Pace {
    stall: Duration,
    lowest_rate: u64,
    /// All the time that was waited for it.
    pub(super) all_waits: Duration,
    /// Since it was found fast enough.
    waited: Duration,
    came: u64,
}

impl Pace {
    /// `downloads` from this peer are under way, and share its link.
    pub(super) fn new(stall: Duration, downloads: u32) -> Self {
        let lowest_rate = (LOWEST_RATE / u64::from(downloads.max(1))).max(LEAST_SHARE);
        Self { stall, lowest_rate, all_waits: Duration::ZERO, waited: Duration::ZERO, came: 0 }
    }

    /// The next bytes. Only the time that is waited for the peer counts, whatever the readers take.
    pub(super) async fn next(&mut self, arriving: &mut Arriving) -> Result<Option<Bytes>, FetchError> {
        let began = Instant::now();
        let chunk =
            timeout(self.stall, arriving.chunk()).await.map_err(|_| FetchError::Timeout(self.stall))??;
        let waited = began.elapsed();
        self.waited += waited;
        self.all_waits += waited;
        self.came += chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
        if self.waited >= self.stall {
            if (self.came as f64) < self.lowest_rate as f64 * self.waited.as_secs_f64() {
                return Err(FetchError::Timeout(self.waited));
            }
            (self.waited, self.came) = (Duration::ZERO, 0);
        }
        Ok(chunk)
    }
}
