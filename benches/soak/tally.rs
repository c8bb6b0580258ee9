//! What is counted, and the numbers that chance is made of.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that goes up.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn one(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What happened.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) built: Count,
    pub(crate) not_built: Count,
    pub(crate) collections: Count,
    pub(crate) collected: Count,
    pub(crate) kills: Count,
    pub(crate) copied: Count,
    /// Copies that Nix gave up because nobody had a path any more.
    pub(crate) gone: Count,
    /// The same, although a peer that is never killed kept it all the time.
    pub(crate) gone_though_kept: Count,
    /// Copies that Nix gave up for another reason.
    pub(crate) not_copied: Count,
    pub(crate) narinfos: Count,
    pub(crate) narinfos_missing: Count,
    pub(crate) nars: Count,
    pub(crate) nars_by_ranges: Count,
    pub(crate) nars_missing: Count,
    /// Bodies that broke off: the client knows.
    pub(crate) cut: Count,
    /// Clients that left in the middle of a NAR.
    pub(crate) left: Count,
    /// What looked complete and was not what Nix had built.
    pub(crate) wrong: Count,
    pub(crate) failed_5xx: Count,
    /// Requests without an answer, or not in time.
    pub(crate) unanswered: Count,
    notes: Mutex<Vec<String>>,
}

/// Enough to see what goes wrong.
const MAX_NOTES: usize = 30;

impl Tally {
    /// Keeps what can't be counted.
    pub(crate) fn note(&self, note: String) {
        let mut notes = self.notes.lock().expect("the notes");
        if notes.len() < MAX_NOTES {
            println!("! {note}");
            notes.push(note);
        }
    }

    /// A line for whoever waits.
    pub(crate) fn in_short(&self) -> String {
        format!(
            "{} closures copied, {} gone, {} NARs, {} cut, {} paths collected, {} kills, {} wrong",
            self.copied.get(),
            self.gone.get(),
            self.nars.get(),
            self.cut.get(),
            self.collected.get(),
            self.kills.get(),
            self.wrong.get(),
        )
    }
}

/// SplitMix64: the same numbers from the same seed.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    /// Whether it happens that happens so many times of a hundred.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
