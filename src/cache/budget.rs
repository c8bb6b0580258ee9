//! Sums that are not exceeded: memory and disk that spools take together.
//!
//! Pure. Whoever waits for some of it is told whenever some may have come free.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// A sum that is not exceeded.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    taken: AtomicU64,
    /// Told when something may have come free.
    freed: Arc<Notify>,
}

/// A part of a budget; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Reserved {
    budget: Arc<Budget>,
    amount: u64,
}

impl Budget {
    pub(super) fn new(limit: u64, freed: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { limit, taken: AtomicU64::new(0), freed })
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }

    /// How much may be reserved.
    pub(super) fn free(&self) -> u64 {
        self.limit.saturating_sub(self.taken())
    }

    pub(super) fn freed(&self) -> &Notify {
        &self.freed
    }

    pub(super) fn reserve(self: &Arc<Self>, amount: u64) -> Option<Reserved> {
        let fits = |taken: u64| taken.checked_add(amount).filter(|sum| *sum <= self.limit);
        let taken = self.taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits);
        taken.is_ok().then(|| Reserved { budget: Arc::clone(self), amount })
    }
}

impl Reserved {
    /// Whether it is a part of this one.
    pub(super) fn is_of(&self, budget: &Arc<Budget>) -> bool {
        Arc::ptr_eq(&self.budget, budget)
    }

    pub(super) fn amount(&self) -> u64 {
        self.amount
    }

    /// Whoever waits for a place may have this one.
    pub(super) fn offer(&self) {
        self.budget.freed.notify_waiters();
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.taken.fetch_sub(self.amount, Ordering::AcqRel);
        self.budget.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_not_exceeded_and_comes_back() {
        let budget = Budget::new(10, Arc::default());
        let all = budget.reserve(10).unwrap();
        assert!(budget.reserve(1).is_none());
        drop(all);
        let some = budget.reserve(4).unwrap();
        assert!(budget.reserve(u64::MAX).is_none());
        assert!(budget.reserve(6).is_some());
        drop(some);
        assert_eq!((budget.taken(), budget.free()), (0, 10));
    }
}
