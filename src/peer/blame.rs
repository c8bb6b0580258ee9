//! How a peer stands: what it did well and badly, and for how long it is not asked because of that.
//!
//! Pure: outcomes and the time in, pauses out. Knows neither who the peer is nor where, so that neither a new address nor
//! a new name makes a failure undone. The one invariant: lies, and NARs that do not come, cost more and more until
//! something that was delivered has proven right, however well the peer answers in between.

use std::time::{Duration, Instant};

/// The first pause after a failure; it doubles with each one in a row.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// No pause is longer.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Who is heard of again is tried again after this at the latest, unless it lied.
pub(super) const PAUSE_WHEN_SEEN: Duration = Duration::from_secs(2);
/// Lies, and NARs that did not come, that are older than this count no more.
const REMEMBERED: Duration = Duration::from_secs(600);

/// How a peer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No answer, or none that is of use.
    NoAnswer,
    /// It said that it has a NAR, which did not come. That it answers other questions is no excuse.
    NoDelivery,
    /// What it said is not so. That it is there and says so is no excuse.
    Lie,
}

/// How a peer stands.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// Failures in a row, without an answer in between.
    pub failures_in_a_row: u32,
    /// Failures since it is known.
    pub failures: u64,
    /// Good answers since it is known.
    pub successes: u64,
    /// Lies that nothing has made up for.
    lies: u32,
    /// NARs that did not come, since one did.
    undelivered: u32,
    /// Not asked before then.
    paused_until: Option<Instant>,
    /// When a failure was counted last.
    failed_last: Option<Instant>,
}

impl Standing {
    /// It answered as it should. True: it had failed before, and is back.
    pub(super) fn answered(&mut self) -> bool {
        self.successes += 1;
        // A liar answers too, and so does who has narinfos and no NARs; their pauses run out by themselves.
        if self.lies == 0 && self.undelivered == 0 {
            self.paused_until = None;
        }
        std::mem::take(&mut self.failures_in_a_row) > 0
    }

    /// What it delivered has proven right.
    pub(super) fn proved_right(&mut self) {
        (self.lies, self.undelivered) = (0, 0);
    }

    /// A request to it that began then failed. Requests that were under way together fail together, and count as one.
    /// Gives the pause if it was doing well before.
    pub(super) fn failed(&mut self, failure: Failure, began: Instant, now: Instant) -> Option<Duration> {
        self.failures += 1;
        let before = self.failed_last.replace(now);
        if self.is_paused(now) || before.is_some_and(|last| began < last) {
            // No more of a pause; but the answers of others that were under way must not make it undone.
            match failure {
                Failure::NoAnswer => {}
                Failure::NoDelivery => self.undelivered = self.undelivered.max(1),
                Failure::Lie => self.lies = self.lies.max(1),
            }
            return None;
        }
        if before.is_some_and(|last| now.saturating_duration_since(last) >= REMEMBERED) {
            (self.lies, self.undelivered) = (0, 0);
        }
        let is_first = self.failures_in_a_row == 0;
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        match failure {
            Failure::NoAnswer => {}
            Failure::NoDelivery => self.undelivered = self.undelivered.saturating_add(1),
            Failure::Lie => self.lies = self.lies.saturating_add(1),
        }
        let pause = pause_after(self.failures_in_a_row.max(self.lies).max(self.undelivered));
        self.paused_until = Some(now + pause);
        is_first.then_some(pause)
    }

    /// It said that it is there, wherever that is: whatever failed on the way to it, it is tried again soon.
    pub(super) fn seen(&mut self, now: Instant) {
        if self.lies == 0 {
            let soon = now + PAUSE_WHEN_SEEN.max(pause_after(self.undelivered));
            self.paused_until = self.paused_until.map(|until| until.min(soon));
        }
    }

    /// Whether it failed so lately that it is not asked.
    #[must_use]
    pub fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// Whether its last word was a failure, or it lied.
    pub(super) fn is_doubtful(&self, now: Instant) -> bool {
        self.failures_in_a_row > 0 || self.is_paused(now)
    }

    /// Whether it was tried, and never once answered: nobody need wait for it.
    pub(super) fn never_answered(&self) -> bool {
        self.successes == 0 && self.failures > 0
    }
}

/// The pause after so many failures.
fn pause_after(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long it is not asked from now on.
    fn pause(standing: &Standing, now: Instant) -> Duration {
        standing.paused_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    #[test]
    fn failures_pause_longer_and_longer_and_an_answer_ends_that() {
        let (mut standing, mut now) = (Standing::default(), Instant::now());
        let mut pauses = Vec::new();
        for round in 0..12 {
            let told = standing.failed(Failure::NoAnswer, now, now);
            assert_eq!(told.is_some(), round == 0, "only the first in a row is worth a word");
            pauses.push(pause(&standing, now));
            now += pause(&standing, now);
            assert!(!standing.is_paused(now));
        }
        assert!(pauses.windows(2).all(|two| two[0] <= two[1]), "{pauses:?}");
        assert_eq!((pauses[0], pauses[11]), (FIRST_PAUSE, LONGEST_PAUSE));
        assert!(standing.answered());
        assert!(!standing.answered());
        assert!(!standing.is_paused(now) && !standing.is_doubtful(now));
    }

    #[test]
    fn requests_that_were_under_way_together_count_as_one() {
        let (mut standing, began) = (Standing::default(), Instant::now());
        let now = began + FIRST_PAUSE * 3;
        for _ in 0..40 {
            standing.failed(Failure::NoAnswer, began, now);
            standing.failed(Failure::Lie, now, now);
            standing.failed(Failure::NoAnswer, began, now + FIRST_PAUSE);
        }
        assert_eq!((standing.failures_in_a_row, standing.failures), (1, 120));
        assert_eq!(pause(&standing, now), FIRST_PAUSE);
    }

    #[test]
    fn who_was_away_and_is_seen_is_asked_soon_and_a_liar_is_not() {
        let now = Instant::now();
        let fails = |failure: Failure| {
            let (mut standing, mut at) = (Standing::default(), now);
            for _ in 0..6 {
                at += LONGEST_PAUSE;
                standing.failed(failure, at, at);
            }
            standing.seen(at);
            pause(&standing, at)
        };
        assert_eq!(fails(Failure::NoAnswer), PAUSE_WHEN_SEEN);
        assert_eq!(fails(Failure::Lie), FIRST_PAUSE * 32);
    }

    #[test]
    fn answers_between_lies_do_not_make_them_cheaper_but_right_deliveries_and_time_do() {
        let (mut standing, mut now) = (Standing::default(), Instant::now());
        let mut lies = |standing: &mut Standing| {
            now += LONGEST_PAUSE;
            standing.answered();
            assert!(standing.failed(Failure::Lie, now, now).is_some());
            pause(standing, now)
        };
        assert_eq!(lies(&mut standing), FIRST_PAUSE);
        assert_eq!(lies(&mut standing), FIRST_PAUSE * 2);
        assert_eq!(lies(&mut standing), FIRST_PAUSE * 4);
        standing.proved_right();
        assert_eq!(lies(&mut standing), FIRST_PAUSE);
        assert_eq!(lies(&mut standing), FIRST_PAUSE * 2);
        now += REMEMBERED;
        standing.failed(Failure::NoAnswer, now, now);
        assert!(pause(&standing, now) <= FIRST_PAUSE * 2, "{:?}", pause(&standing, now));
    }

    #[test]
    fn nars_that_do_not_come_add_up_until_one_does() {
        let (mut standing, mut now) = (Standing::default(), Instant::now());
        let mut fails = |standing: &mut Standing| {
            now += LONGEST_PAUSE;
            standing.answered();
            assert!(standing.failed(Failure::NoDelivery, now, now).is_some());
            // Neither an answer that was under way nor an announcement makes it cheaper.
            standing.answered();
            standing.seen(now);
            pause(standing, now)
        };
        for doublings in 0..5 {
            assert_eq!(fails(&mut standing), FIRST_PAUSE * (1 << doublings));
        }
        standing.proved_right();
        assert_eq!(fails(&mut standing), FIRST_PAUSE);
    }

    #[test]
    fn who_left_in_the_middle_of_a_nar_is_asked_soon_after_it_is_back() {
        let (mut standing, mut now) = (Standing::default(), Instant::now());
        standing.failed(Failure::NoDelivery, now, now);
        for _ in 0..8 {
            now += LONGEST_PAUSE;
            standing.failed(Failure::NoAnswer, now, now);
        }
        standing.seen(now);
        assert_eq!(pause(&standing, now), PAUSE_WHEN_SEEN);
    }

    #[test]
    fn what_fails_during_a_pause_counts_once_all_the_same() {
        for failure in [Failure::Lie, Failure::NoDelivery] {
            let (mut standing, now) = (Standing::default(), Instant::now());
            standing.failed(Failure::NoAnswer, now, now);
            for _ in 0..9 {
                standing.failed(failure, now, now);
            }
            standing.answered();
            assert_eq!(pause(&standing, now), FIRST_PAUSE, "an answer does not end the pause of {failure:?}");
            let later = now + LONGEST_PAUSE;
            standing.failed(failure, later, later);
            assert_eq!(pause(&standing, later), FIRST_PAUSE * 2);
        }
    }
}
