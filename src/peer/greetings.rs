//! How many announcements from one address are answered: ids cost nothing to make up, and neither does the address that a
//! datagram says it comes from.
//!
//! Pure: announcements and the time in.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Answers to one address within a pause: several daemons may run there.
const PER_ADDRESS: u32 = 4;
/// Addresses that are answered within a pause. The others hear the next announcement to all.
const MAX_ADDRESSES: usize = 1024;

/// Who was answered lately.
#[derive(Debug, Default)]
pub(super) struct Greetings {
    lately: HashMap<IpAddr, (Instant, u32)>,
}

impl Greetings {
    /// Whether one more answer goes to this address.
    pub(super) fn allow(&mut self, to: IpAddr, pause: Duration, now: Instant) -> bool {
        self.lately.retain(|_, (began, _)| now.saturating_duration_since(*began) < pause);
        if !self.lately.contains_key(&to) && self.lately.len() >= MAX_ADDRESSES {
            return false;
        }
        let (_, count) = self.lately.entry(to).or_insert((now, 0));
        *count = count.saturating_add(1);
        *count <= PER_ADDRESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_an_address_nor_many_get_answers_without_end() {
        let (mut greetings, now, pause) = (Greetings::default(), Instant::now(), Duration::from_secs(2));
        let address = |number: u32| IpAddr::from((0x0a00_0000 + number).to_be_bytes());
        let count = |greetings: &mut Greetings, now| {
            (0..1000).filter(|_| greetings.allow(address(0), pause, now)).count() as u32
        };
        assert_eq!(count(&mut greetings, now), PER_ADDRESS);
        assert_eq!(count(&mut greetings, now + pause), PER_ADDRESS);
        for number in 0..10_000 {
            greetings.allow(address(number), pause, now + pause);
        }
        assert_eq!(greetings.lately.len(), MAX_ADDRESSES);
    }
}
