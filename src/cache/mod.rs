//! What is remembered between requests: who served a narinfo, what nobody had, and what is being downloaded.
//!
//! Bounded, with an expiry, and gone with the daemon. Knows peers by their ids and nothing of how they are asked.

mod budget;
mod misses;
mod peer_cache;
mod spool;
mod spool_state;
mod spools;

use std::time::Duration;

use serde::Deserialize;

pub use misses::{Misses, Question};
pub use peer_cache::{HOLDERS, Origin, PeerCache, Served};
pub use spool::{Appender, Deserted, SpoolReader, SpoolWriter, StillRead};
pub use spool_state::{Piece, SpoolError};
pub use spools::{Begin, Memory, Prepare, Spools};

/// `[cache]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// How long it is remembered who served a narinfo. 1s to 90days; default 7days (Nix remembers a narinfo for 30).
    #[serde(with = "humantime_serde")]
    pub positive_ttl: Duration,
    /// How long it is remembered that no peer has a path. 0s to 1day; default 5min.
    #[serde(with = "humantime_serde")]
    pub negative_ttl: Duration,
    /// How many narinfos, and how many misses, are remembered. 1 to 10,000,000; default 100,000.
    pub entries: u64,
}

impl Default for Options {
    fn default() -> Self {
        let minute = Duration::from_secs(60);
        Self { positive_ttl: minute * 60 * 24 * 7, negative_ttl: minute * 5, entries: 100_000 }
    }
}

impl Options {
    /// What is out of range, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        let day = Duration::from_secs(24 * 60 * 60);
        let range = |key: &str, good: bool, range: &str| {
            if good { Ok(()) } else { Err(format!("cache.{key}: has to be {range}")) }
        };
        let positive = (Duration::from_secs(1)..=90 * day).contains(&self.positive_ttl);
        range("positive_ttl", positive, "1s to 90days")?;
        range("negative_ttl", self.negative_ttl <= day, "0s to 1day")?;
        range("entries", (1..=10_000_000).contains(&self.entries), "1 to 10000000")
    }
}
