//! The paths that came lately, numbered: whoever knows an older state is told the difference.
//!
//! Pure. Numbers mean something within one run of the daemon only.

use std::collections::VecDeque;

use crate::nix::StorePathHash;

/// Gains that are kept; who knows less than these has to be told everything. As many as are told at once: more would be kept
/// for nobody.
pub const KEPT_GAINS: usize = 4096;

/// The last gains.
#[derive(Debug, Default)]
pub(super) struct Gains {
    /// Of the last one; the first has 1.
    number: u64,
    kept: VecDeque<StorePathHash>,
}

impl Gains {
    pub(super) fn add(&mut self, hash: StorePathHash) {
        if self.kept.len() >= KEPT_GAINS {
            self.kept.pop_front();
        }
        self.kept.push_back(hash);
        self.number += 1;
    }

    /// So many came, of which none is kept: who knows an older state has to be told everything.
    pub(super) fn skip(&mut self, count: usize) {
        self.kept.clear();
        self.number += count as u64;
    }

    /// The number of the last one.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// What came after the gain with this number. `None`: more than is kept, or the number was never given.
    pub(super) fn since(&self, number: u64) -> Option<Vec<StorePathHash>> {
        let count = usize::try_from(self.number.checked_sub(number)?).ok()?;
        let first = self.kept.len().checked_sub(count)?;
        Some(self.kept.range(first..).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: usize) -> StorePathHash {
        StorePathHash::parse(format!("{number:0>32}").as_bytes()).unwrap()
    }

    #[test]
    fn the_difference_is_exact_or_not_given() {
        let mut gains = Gains::default();
        assert_eq!(gains.since(0), Some(Vec::new()));
        assert_eq!(gains.since(1), None);
        for number in 1..=KEPT_GAINS + 10 {
            gains.add(hash(number));
        }
        assert_eq!(gains.number(), KEPT_GAINS as u64 + 10);
        assert_eq!(
            gains.since(KEPT_GAINS as u64 + 8),
            Some(vec![hash(KEPT_GAINS + 9), hash(KEPT_GAINS + 10)])
        );
        assert_eq!(gains.since(10).map(|all| all.len()), Some(KEPT_GAINS));
        assert_eq!((gains.since(9), gains.since(KEPT_GAINS as u64 + 11)), (None, None));
        gains.skip(2);
        let latest = KEPT_GAINS as u64 + 12;
        assert_eq!((gains.since(latest - 1), gains.since(latest)), (None, Some(Vec::new())));
        gains.add(hash(1));
        assert_eq!((gains.since(latest), gains.number()), (Some(vec![hash(1)]), latest + 1));
    }
}
