//! One process with the leases that it holds, and the leases of those that died.
//!
//! Leases end with their process. So it is remembered which there are, for the process that takes them again; whoever has a
//! lease of a dead one keeps its heir alive, as if it had come from there.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::child::Child;
use super::leases::Generation;
use crate::nix::StorePath;

/// A process, in office or after it.
pub(super) struct Holder {
    pub(super) child: Child,
    pub(super) generation: Arc<Generation>,
    /// When it came into office, or left it.
    pub(super) since: Instant,
    /// How many paths it was asked about. Each has a root of it, also one that is not valid or was being made.
    pub(super) roots: usize,
    /// How many of these are leases.
    pub(super) leases: usize,
    paths: Vec<StorePath>,
    /// Processes whose leases it took over.
    heir_of: Vec<Weak<Generation>>,
}

impl Holder {
    pub(super) fn new(child: Child, generation: Arc<Generation>) -> Self {
        let (paths, heir_of) = (Vec::new(), Vec::new());
        Self { child, generation, since: Instant::now(), roots: 0, leases: 0, paths, heir_of }
    }

    /// It has leased these too. No more than `at_most` are remembered.
    pub(super) fn add<'a>(&mut self, paths: impl ExactSizeIterator<Item = &'a StorePath>, at_most: usize) {
        self.leases += paths.len();
        let room = at_most.saturating_sub(self.paths.len());
        self.paths.extend(paths.take(room).cloned());
    }

    /// Whether something is being read under one of its leases.
    pub(super) fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.generation) > 1 || self.heir_of.iter().any(|of| of.strong_count() > 0)
    }
}

/// Leases that are to be taken again.
#[derive(Default)]
pub(super) struct LostLeases {
    /// Those of the process that died last come last.
    paths: Vec<StorePath>,
    of: Vec<Weak<Generation>>,
    /// When the first of them was lost.
    since: Option<Instant>,
}

impl LostLeases {
    /// Those of a process that died. No more than `at_most` are kept.
    pub(super) fn add(&mut self, dead: &mut Holder, at_most: usize) {
        if dead.paths.is_empty() {
            return;
        }
        // Not put off by a process that dies of the leases that it was to take again.
        self.since.get_or_insert_with(Instant::now);
        self.paths.append(&mut dead.paths);
        self.paths.drain(..self.paths.len().saturating_sub(at_most));
        self.of.append(&mut dead.heir_of);
        self.of.push(Arc::downgrade(&dead.generation));
        self.of.retain(|of| of.strong_count() > 0);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// The next ones, newest first.
    pub(super) fn take(&mut self, at_most: usize) -> Vec<StorePath> {
        self.paths.split_off(self.paths.len().saturating_sub(at_most))
    }

    /// They could not be taken yet.
    pub(super) fn put_back(&mut self, mut paths: Vec<StorePath>) {
        self.paths.append(&mut paths);
    }

    /// This process has taken some of them.
    pub(super) fn leave_to(&mut self, heir: &mut Holder) {
        for of in &self.of {
            if !heir.heir_of.iter().any(|known| known.ptr_eq(of)) {
                heir.heir_of.push(Weak::clone(of));
            }
        }
        if self.is_empty() {
            *self = Self::default();
        }
    }

    /// Forgets what was not to be kept for longer anyway.
    pub(super) fn expire(&mut self, now: Instant, lease: Duration) {
        if self.since.is_some_and(|since| now.saturating_duration_since(since) > lease) {
            *self = Self::default();
        }
    }
}
