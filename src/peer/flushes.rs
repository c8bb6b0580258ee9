//! How often a peer may make this host forget all misses: when it came, or gained more paths than it can name.
//!
//! Pure: requests and the time in, flushes out. One a second for each address. More are put off until the second is over
//! and become one there, never dropped: news that are lost would leave a path hidden behind a remembered miss.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// One flush of an address in so much time.
const PERIOD: Duration = Duration::from_secs(1);
/// Addresses that are told apart; beyond it all others share a turn.
const MAX_ADDRESSES: usize = 1024;

/// What was flushed lately, and what is put off.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    turns: HashMap<IpAddr, Turn>,
}

#[derive(Debug)]
struct Turn {
    /// When its next flush may be.
    next: Instant,
    is_waiting: bool,
}

impl Flushes {
    /// Somebody asks for a flush. True: now; else it is put off.
    pub(super) fn ask(&mut self, from: IpAddr, now: Instant) -> bool {
        self.turns.retain(|_, turn| turn.is_waiting || turn.next > now);
        let is_told_apart = self.turns.contains_key(&from) || self.turns.len() < MAX_ADDRESSES;
        let from = if is_told_apart { from } else { Ipv4Addr::UNSPECIFIED.into() };
        if let Some(turn) = self.turns.get_mut(&from) {
            turn.is_waiting = true;
            return false;
        }
        self.turns.insert(from, Turn { next: now + PERIOD, is_waiting: false });
        true
    }

    /// When the next flush that was put off is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.turns.values().filter(|turn| turn.is_waiting).map(|turn| turn.next).min()
    }

    /// Whether a flush that was put off is due: one for all of them.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        let mut is_due = false;
        for turn in self.turns.values_mut().filter(|turn| turn.is_waiting && turn.next <= now) {
            *turn = Turn { next: now + PERIOD, is_waiting: false };
            is_due = true;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_flush_a_second_and_the_last_one_is_not_lost() {
        let (mut flushes, began) = (Flushes::default(), Instant::now());
        let (from, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let (mut now, mut count) = (began, 0);
        while now < began + PERIOD * 10 {
            count += usize::from(flushes.ask(from, now)) + usize::from(flushes.take_due(now));
            now += PERIOD / 100;
        }
        assert!((10..=11).contains(&count), "{count}");
        assert!(flushes.ask(other, now), "another's flood is not this one's");
        let due = flushes.next().unwrap();
        assert!(due <= now + PERIOD && !flushes.take_due(due - PERIOD / 100));
        assert!(flushes.take_due(due));
        assert_eq!(flushes.next(), None);
        assert!(flushes.ask(from, due + PERIOD));
    }

    #[test]
    fn any_number_of_addresses_is_bounded() {
        let (mut flushes, now) = (Flushes::default(), Instant::now());
        for number in 0..100_000_u32 {
            flushes.ask(Ipv4Addr::from_bits(0x0a00_0000 + number).into(), now);
        }
        assert!(flushes.turns.len() <= MAX_ADDRESSES + 1);
        assert!(flushes.take_due(now + PERIOD));
    }
}
