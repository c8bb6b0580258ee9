//! Who is asked, of several that would do: the less busy of two at random.
//!
//! The best of all would be the best for everybody at once, and chance alone now and then overloads one; of two, chance spreads the
//! load and the worse one is hardly ever taken (Mitzenmacher, "The power of two choices in randomized load balancing").

use crate::peer::Peer;

/// A peer that sends so many times as much is taken; less is chance.
const FASTER: f64 = 2.0;

/// One of those, with its peer as it is now. `None`: there is none.
pub(super) fn less_busy<T>(mut among: Vec<(Peer, T)>) -> Option<T> {
    let mut any = || (!among.is_empty()).then(|| among.swap_remove(fastrand::usize(..among.len())));
    let (one, other) = (any()?, any());
    match other {
        Some(other) if is_better(&other.0, &one.0) => Some(other.1),
        _ => Some(one.1),
    }
}

/// Whether a request is better sent to `one`.
fn is_better(one: &Peer, other: &Peer) -> bool {
    if one.in_flight != other.in_flight {
        return one.in_flight < other.in_flight;
    }
    // Of whom nothing is known, it is to be found out.
    let rate = |peer: &Peer| peer.bytes_per_second.unwrap_or(f64::INFINITY);
    rate(one) > FASTER * rate(other)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::peer::{PeerId, Registry};

    /// How often each is taken.
    fn taken(peers: &[Peer]) -> Vec<usize> {
        let mut taken = vec![0; peers.len()];
        for _ in 0..3000 {
            let among = peers.iter().cloned().enumerate().map(|(number, peer)| (peer, number)).collect();
            taken[less_busy(among).unwrap()] += 1;
        }
        taken
    }

    #[test]
    fn load_is_spread_and_the_busiest_and_the_slowest_are_left_alone() {
        let mut registry = Registry::new("me".to_owned(), Duration::from_secs(60), 10);
        let urls = ["http://a", "http://b", "http://c"];
        let ids: [PeerId; 3] = urls.map(|url| {
            registry.configured(url, Instant::now());
            registry.all().into_iter().find(|peer| peer.url == url).unwrap().id
        });
        let peers = |registry: &Registry| ids.each_ref().map(|id| registry.get(id).unwrap().clone());
        let even = taken(&peers(&registry));
        assert!(even.iter().all(|times| *times > 700), "{even:?}");
        for (id, rate) in ids.iter().zip([100, 110, 10]) {
            registry.delivered(id, rate << 20, Duration::from_secs(1));
        }
        let by_rate = taken(&peers(&registry));
        assert!(by_rate[2] == 0 && by_rate[0] > 700 && by_rate[1] > 700, "{by_rate:?}");
        registry.began(&ids[0]);
        let by_load = taken(&peers(&registry));
        assert!(by_load[0] == 0 && by_load[1] > by_load[2] && by_load[2] > 700, "{by_load:?}");
        assert_eq!(less_busy::<()>(Vec::new()), None);
    }
}
