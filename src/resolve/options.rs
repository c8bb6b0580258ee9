//! `[resolve]`: what can be set about finding and relaying.

use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;

/// `[resolve]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// How long a narinfo may be looked for on the LAN; then it is 404. 10ms to 30s; default 250ms.
    #[serde(with = "humantime_serde")]
    pub narinfo_budget: Duration,
    /// NARs of peers up to this size are sent only after they are verified; larger ones keep their last bytes back until
    /// they are. At most 256 MiB; default 4 MiB.
    pub verify_first: ByteSize,
    /// How long a peer may send nothing in the middle of a NAR. 100ms to 10min; default 5s.
    #[serde(with = "humantime_serde")]
    pub stall: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let narinfo_budget = Duration::from_millis(250);
        Self { narinfo_budget, verify_first: ByteSize::mib(4), stall: Duration::from_secs(5) }
    }
}

impl Options {
    /// What is out of range, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        let range = |key: &str, good: bool, range: &str| {
            if good { Ok(()) } else { Err(format!("resolve.{key}: has to be {range}")) }
        };
        let budget = Duration::from_millis(10)..=Duration::from_secs(30);
        range("narinfo_budget", budget.contains(&self.narinfo_budget), "10ms to 30s")?;
        range("verify_first", self.verify_first <= ByteSize::mib(256), "at most 256 MiB")?;
        let stall = Duration::from_millis(100)..=Duration::from_secs(600);
        range("stall", stall.contains(&self.stall), "100ms to 10min")
    }
}
