//! How fast NARs come from one peer, as they are and packed, so that they are asked for packed only where that is faster.
//!
//! Pure: the clock is passed in. What counts is the time in which at least one stream waits for the peer, so that streams that
//! share the link are measured together, and a client that reads slowly is not taken for a slow link. While one form is in use
//! the other is not measured, and is forgotten after a while: then it is tried again.

use std::time::{Duration, Instant};

/// How a NAR travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As it is.
    Plain,
    /// As zstd.
    Packed,
}

/// So much has to come before a rate is believed, in bytes of NARs.
const EVIDENCE: f64 = 512.0 * 1024.0;
/// What was measured counts half when so much time was spent waiting since, in seconds.
const MEMORY: f64 = 1.0;
/// What was measured is forgotten when so much time was spent waiting for the other form since, in seconds.
const FORGOTTEN: f64 = 15.0;
/// Packed NARs have to come this much as fast as plain ones to be asked for again. Content differs: what does not pack comes no
/// faster, and that is no reason to ask for the rest as it is.
const WORTH_IT: f64 = 0.9;

/// What is known of the way to one peer.
#[derive(Debug)]
pub(super) struct Link {
    plain: Rate,
    packed: Rate,
    settled: Option<Instant>,
}

/// Of one form.
#[derive(Debug, Default)]
struct Rate {
    bytes: f64,
    seconds: f64,
    /// Spent waiting for the other form since this one was measured.
    unused_seconds: f64,
    /// Streams that wait now.
    waiting: u32,
}

impl Rate {
    fn bytes_per_second(&self) -> Option<f64> {
        (self.bytes >= EVIDENCE).then(|| self.bytes / self.seconds.max(1e-6))
    }

    fn waited(&mut self, seconds: f64) {
        self.seconds += seconds;
        if self.seconds > 2.0 * MEMORY && self.bytes > 2.0 * EVIDENCE {
            self.bytes /= 2.0;
            self.seconds /= 2.0;
        }
    }

    fn was_unused(&mut self, seconds: f64) {
        self.unused_seconds += seconds;
        if self.unused_seconds > FORGOTTEN {
            *self = Self { waiting: self.waiting, ..Self::default() };
        }
    }
}

impl Link {
    pub(super) fn new() -> Self {
        Self { plain: Rate::default(), packed: Rate::default(), settled: None }
    }

    /// A stream begins to wait for its next bytes.
    pub(super) fn waits(&mut self, form: Form, now: Instant) {
        self.settle(now);
        self.of(form).waiting += 1;
    }

    /// It waits no more; so many bytes of its NAR came.
    pub(super) fn came(&mut self, form: Form, bytes: u64, now: Instant) {
        self.settle(now);
        // Both at once share the link in a way that says nothing of either.
        let is_alone = self.plain.waiting == 0 || self.packed.waiting == 0;
        let rate = self.of(form);
        rate.waiting = rate.waiting.saturating_sub(1);
        if is_alone && bytes > 0 {
            rate.bytes += bytes as f64;
            rate.unused_seconds = 0.0;
        }
    }

    /// Whether the next NAR is to be asked for as zstd: what the link carries, in bytes a second, which the peer has to know.
    /// `None`: as it is, for that is faster, or it is not known how fast that would be.
    pub(super) fn to_be_packed(&self) -> Option<u64> {
        let plain = self.plain.bytes_per_second()?;
        let is_slower = self.packed.bytes_per_second().is_some_and(|packed| packed < plain * WORTH_IT);
        (!is_slower).then_some(plain as u64)
    }

    fn of(&mut self, form: Form) -> &mut Rate {
        match form {
            Form::Plain => &mut self.plain,
            Form::Packed => &mut self.packed,
        }
    }

    /// Counts the time since this was done last.
    fn settle(&mut self, now: Instant) {
        let before = self.settled.replace(now);
        let passed = before.map_or(Duration::ZERO, |before| now.saturating_duration_since(before));
        let seconds = passed.as_secs_f64();
        match (self.plain.waiting > 0, self.packed.waiting > 0) {
            (true, false) => {
                self.plain.waited(seconds);
                self.packed.was_unused(seconds);
            }
            (false, true) => {
                self.packed.waited(seconds);
                self.plain.was_unused(seconds);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// A link under a clock that is told.
    struct Bench(Link, Instant);

    impl Bench {
        fn new() -> Self {
            Self(Link::new(), Instant::now())
        }

        /// Streams that wait together and get so many bytes a second, all of them.
        fn carries(&mut self, form: Form, streams: u32, rate: u64, millis: u64) {
            (0..streams).for_each(|_| self.0.waits(form, self.1));
            for _ in 0..millis {
                self.1 += Duration::from_millis(1);
                (0..streams).for_each(|_| {
                    self.0.came(form, rate / 1000 / u64::from(streams), self.1);
                    self.0.waits(form, self.1);
                });
            }
            (0..streams).for_each(|_| self.0.came(form, 0, self.1));
        }

        fn told(&self) -> Option<u64> {
            self.0.to_be_packed().map(|rate| rate / MB)
        }
    }

    #[test]
    fn nothing_is_asked_for_packed_before_the_link_is_known_and_streams_are_measured_together() {
        let mut link = Bench::new();
        assert_eq!(link.told(), None);
        link.carries(Form::Plain, 1, 100 * MB, 4);
        assert_eq!(link.told(), None);
        link.carries(Form::Plain, 5, 100 * MB, 100);
        assert!(link.told().is_some_and(|rate| (95..=105).contains(&rate)), "{:?}", link.told());
    }

    #[test]
    fn the_time_of_a_slow_reader_does_not_count() {
        let mut link = Bench::new();
        for _ in 0..50 {
            link.carries(Form::Plain, 1, 100 * MB, 2);
            link.1 += Duration::from_secs(1);
        }
        assert!(link.told().is_some_and(|rate| (95..=105).contains(&rate)), "{:?}", link.told());
    }

    #[test]
    fn what_comes_slower_packed_is_asked_for_as_it_is_until_that_was_long_ago() {
        let mut link = Bench::new();
        link.carries(Form::Plain, 1, 100 * MB, 100);
        link.carries(Form::Packed, 1, 95 * MB, 100);
        assert!(link.told().is_some(), "content that does not pack");
        link.carries(Form::Packed, 1, 60 * MB, 3000);
        assert_eq!(link.told(), None);
        link.carries(Form::Plain, 1, 100 * MB, 10_000);
        assert_eq!(link.told(), None);
        link.carries(Form::Plain, 1, 100 * MB, 6000);
        assert!(link.told().is_some(), "tried again");
    }

    #[test]
    fn the_plain_link_is_measured_again_after_a_while_of_packed_ones_and_not_of_rest() {
        let mut link = Bench::new();
        link.carries(Form::Plain, 1, 100 * MB, 100);
        link.1 += Duration::from_secs(3600);
        assert!(link.told().is_some());
        link.carries(Form::Packed, 1, 250 * MB, 10_000);
        assert!(link.told().is_some());
        link.carries(Form::Packed, 1, 250 * MB, 6000);
        assert_eq!(link.told(), None);
        link.carries(Form::Plain, 1, 40 * MB, 100);
        assert!(link.told().is_some_and(|rate| (38..=42).contains(&rate)), "{:?}", link.told());
    }

    #[test]
    fn a_link_that_gets_faster_is_noticed() {
        let mut link = Bench::new();
        link.carries(Form::Plain, 1, 100 * MB, 2000);
        link.carries(Form::Plain, 1, 1000 * MB, 6000);
        assert!(link.told().is_some_and(|rate| rate > 900), "{:?}", link.told());
    }
}
