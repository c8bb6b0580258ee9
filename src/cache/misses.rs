//! Misses: what every peer said it does not have.
//!
//! A miss that is noted after something changed is worth nothing, so a [`Question`] is opened before the peers are
//! asked, and its miss is remembered only if nobody came or gained the path in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use moka::sync::Cache;

use super::Options;
use crate::nix::StorePathHash;

/// Remembered misses. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct Misses {
    /// The epoch in which each miss was found.
    misses: Cache<StorePathHash, u64>,
    /// Counts the flushes: what was found before the last one is not believed.
    epoch: Arc<AtomicU64>,
    /// Questions that are open, and how often their path was gained since.
    open: Arc<DashMap<StorePathHash, (u64, u64)>>,
}

/// A question to the peers that is under way. Dropping it without a word remembers nothing.
#[derive(Debug)]
pub struct Question {
    misses: Misses,
    hash: StorePathHash,
    epoch: u64,
    gains: u64,
}

impl Misses {
    /// Nothing is missed yet.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        let misses =
            Cache::builder().max_capacity(options.entries).time_to_live(options.negative_ttl).build();
        Self { misses, epoch: Arc::default(), open: Arc::default() }
    }

    /// Whether every peer said that it does not have it, and nothing was heard since.
    #[must_use]
    pub fn contains(&self, hash: &StorePathHash) -> bool {
        self.misses.get(hash) == Some(self.epoch.load(Ordering::Acquire))
    }

    /// The peers are about to be asked.
    #[must_use]
    pub fn ask(&self, hash: StorePathHash) -> Question {
        let epoch = self.epoch.load(Ordering::Acquire);
        let mut open = self.open.entry(hash).or_insert((0, 0));
        open.0 += 1;
        let gains = open.1;
        drop(open);
        Question { misses: self.clone(), hash, epoch, gains }
    }

    /// Somebody came who may have anything.
    pub fn flush(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    /// Somebody gained this path.
    pub fn gained(&self, hash: &StorePathHash) {
        if let Some(mut open) = self.open.get_mut(hash) {
            open.1 += 1;
        }
        self.misses.invalidate(hash);
    }

    /// How many are remembered, about.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.misses.entry_count()
    }

    /// Whether none is remembered, about.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Question {
    /// Whether nobody came or gained the path since it was asked.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        let gains = self.misses.open.get(&self.hash).map(|open| open.1);
        self.epoch == self.misses.epoch.load(Ordering::Acquire) && gains == Some(self.gains)
    }

    /// Every peer said "not here".
    pub fn nobody_has_it(&self) {
        // Under the entry's lock, so that no gain falls between the look and the note.
        if let Some(open) = self.misses.open.get(&self.hash)
            && open.1 == self.gains
        {
            self.misses.misses.insert(self.hash, self.epoch);
        }
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        self.misses.open.remove_if_mut(&self.hash, |_, open| {
            open.0 -= 1;
            open.0 == 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn misses() -> (Misses, StorePathHash) {
        (Misses::new(&Options::default()), StorePathHash::parse(&[b'0'; 32]).unwrap())
    }

    #[test]
    fn a_miss_is_remembered_until_somebody_comes_or_gains_it() {
        let (misses, hash) = misses();
        misses.ask(hash).nobody_has_it();
        assert!(misses.contains(&hash));
        misses.gained(&hash);
        assert!(!misses.contains(&hash));
        misses.ask(hash).nobody_has_it();
        misses.flush();
        assert!(!misses.contains(&hash));
        drop(misses.ask(hash));
        assert!(!misses.contains(&hash));
    }

    #[test]
    fn news_during_a_question_make_its_miss_worthless() {
        let (misses, hash) = misses();
        let question = misses.ask(hash);
        assert!(question.is_fresh());
        misses.gained(&hash);
        question.nobody_has_it();
        assert!(!misses.contains(&hash) && !question.is_fresh());
        let later = misses.ask(hash);
        assert!(later.is_fresh() && !question.is_fresh());
        misses.flush();
        later.nobody_has_it();
        assert!(!misses.contains(&hash) && !later.is_fresh());
        drop((question, later));
        assert!(misses.open.is_empty());
    }

    #[test]
    fn a_time_to_live_of_nothing_remembers_nothing() {
        let options = Options { negative_ttl: std::time::Duration::ZERO, ..Options::default() };
        let (misses, (_, hash)) = (Misses::new(&options), misses());
        misses.ask(hash).nobody_has_it();
        assert!(!misses.contains(&hash));
    }
}
