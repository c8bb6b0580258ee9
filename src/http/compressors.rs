//! Whether a NAR is packed on its way to a peer, how well, and when: what is faster, by the measured speed of link and
//! compressor.
//!
//! The asker says what the link carries. How fast this machine packs is measured on what it packs; what the levels cost beside
//! each other was measured once. Knows nothing of NARs. The invariants: no more threads pack than there are places, and no more
//! streams are packed than memory is meant for.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::packer::Packer;

/// Streams that are packed at once, for each thread that packs. Most wait for their link; each takes up to 4 MB.
const STREAMS: usize = 8;
/// Pieces of one stream that are packed at the same time, or wait for its link.
pub(super) const AHEAD: usize = 4;
/// What is faster by less than this is not worth the work.
const GAIN: f64 = 1.15;
/// The speed that was measured counts half when it took so long to pack since, in seconds.
const MEMORY: f64 = 1.0;
/// How long a measurement is believed while nothing is packed: the machine may not have been as busy before or after.
const BELIEVED: Duration = Duration::from_secs(10);

/// A level of zstd.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Level {
    pub(super) level: i32,
    /// Bytes a second that one thread takes in, and how much of them is left: programs and libraries, on a machine of 2025.
    speed: f64,
    ratio: f64,
}

/// The cheapest first.
const LEVELS: [Level; 3] = [
    Level { level: -1, speed: 398e6, ratio: 0.445 },
    Level { level: 1, speed: 315e6, ratio: 0.39 },
    Level { level: 3, speed: 172e6, ratio: 0.347 },
];
/// For clients of which nothing is known but that they want it packed.
const USUAL: Level = LEVELS[1];

/// Those who pack. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub(super) struct Compressors(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    threads: usize,
    places: Arc<Semaphore>,
    /// As many as were ever at work at once.
    packers: Mutex<Vec<Packer>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    machine: Machine,
    /// How many streams are packed for whom.
    streams: HashMap<IpAddr, usize>,
}

/// How fast this machine packs, as a multiple of what the levels say.
#[derive(Clone, Copy, Debug, Default)]
struct Machine {
    expected_seconds: f64,
    seconds: f64,
    measured: Option<Instant>,
}

/// One stream that is packed; dropping it makes room for another.
#[derive(Debug)]
pub(super) struct Packing {
    inner: Arc<Inner>,
    asker: IpAddr,
    level: Level,
}

impl Compressors {
    /// `threads` pack at once; 0: nobody packs for peers.
    pub(super) fn new(threads: usize) -> Self {
        // What plain clients ask for by its URL has to be packed all the same.
        let places = Arc::new(Semaphore::new(threads.max(1)));
        Self(Arc::new(Inner { threads, places, packers: Mutex::default(), state: Mutex::default() }))
    }

    /// For a peer, over a link that carries so many bytes a second. `None`: the NAR goes as it is, for that is faster.
    pub(super) fn for_peer(&self, asker: IpAddr, link: u64) -> Option<Packing> {
        let inner = &self.0;
        let mut state = inner.state();
        let (own, all) = (state.of(asker), state.all());
        if all >= inner.threads * STREAMS {
            return None;
        }
        // Its share of the threads; one stream alone keeps no more than so many busy.
        let share = inner.threads as f64 * (own + 1) as f64 / (all + 1) as f64;
        let machine = state.machine.factor(Instant::now()) * share.min(((own + 1) * AHEAD) as f64);
        let level = best(link as f64, machine)?;
        Some(inner.begin(&mut state, asker, level))
    }

    /// For a client that wants it packed whatever that takes. `None`: as many are packed as there is memory for.
    pub(super) fn for_client(&self, client: IpAddr) -> Option<Packing> {
        let inner = &self.0;
        let mut state = inner.state();
        let has_room = state.all() < inner.threads.max(1) * STREAMS;
        has_room.then(|| inner.begin(&mut state, client, USUAL))
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn packers(&self) -> MutexGuard<'_, Vec<Packer>> {
        self.packers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn packer(&self) -> io::Result<Packer> {
        let idle = self.packers().pop();
        idle.map_or_else(Packer::new, Ok)
    }

    fn begin(self: &Arc<Self>, state: &mut State, asker: IpAddr, level: Level) -> Packing {
        *state.streams.entry(asker).or_default() += 1;
        Packing { inner: Arc::clone(self), asker, level }
    }
}

impl State {
    fn of(&self, asker: IpAddr) -> usize {
        self.streams.get(&asker).copied().unwrap_or_default()
    }

    fn all(&self) -> usize {
        self.streams.values().sum()
    }
}

impl Machine {
    fn factor(&self, now: Instant) -> f64 {
        let is_fresh = self.measured.is_some_and(|at| now.saturating_duration_since(at) < BELIEVED);
        if is_fresh { self.expected_seconds / self.seconds.max(1e-6) } else { 1.0 }
    }

    fn packed(&mut self, level: Level, bytes: usize, took: Duration, now: Instant) {
        if self.measured.is_none_or(|at| now.saturating_duration_since(at) >= BELIEVED) {
            *self = Self::default();
        }
        self.measured = Some(now);
        self.expected_seconds += bytes as f64 / level.speed;
        self.seconds += took.as_secs_f64();
        if self.seconds > 2.0 * MEMORY {
            self.expected_seconds /= 2.0;
            self.seconds /= 2.0;
        }
    }
}

/// The level that brings most bytes a second over this link, if it brings more than none by enough. `machine`: how often the
/// speed of the levels is to be had.
fn best(link: f64, machine: f64) -> Option<Level> {
    let brings = |level: &Level| (level.speed * machine).min(link / level.ratio);
    let best = LEVELS.into_iter().reduce(|one, next| if brings(&next) > brings(&one) { next } else { one });
    best.filter(|level| brings(level) > link * GAIN)
}

impl Packing {
    /// Packs some bytes into a frame of zstd, as soon as a thread may. `None`: the daemon stops.
    pub(super) async fn pack(&self, bytes: Bytes) -> Option<io::Result<Bytes>> {
        let place = Arc::clone(&self.inner.places).acquire_owned().await.ok()?;
        let (inner, level) = (Arc::clone(&self.inner), self.level);
        let packing = spawn_blocking(move || {
            let mut packer = inner.packer()?;
            let began = Instant::now();
            let frame = packer.pack(level.level, &bytes)?;
            inner.state().machine.packed(level, bytes.len(), began.elapsed(), Instant::now());
            inner.packers().push(packer);
            drop(place);
            Ok(frame)
        });
        packing.await.ok()
    }
}

impl Drop for Packing {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        if let Some(streams) = state.streams.get_mut(&self.asker) {
            *streams -= 1;
            if *streams == 0 {
                state.streams.remove(&self.asker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::gigabit(118e6, 1.0, Some(1))]
    #[case::gigabit_of_a_busy_machine(118e6, 0.7, Some(-1))]
    #[case::gigabit_of_a_slow_machine(118e6, 0.3, None)]
    #[case::hundred_megabits(11.8e6, 1.0, Some(3))]
    #[case::two_and_a_half_gigabits(295e6, 1.0, Some(-1))]
    #[case::ten_gigabits(1180e6, 1.0, None)]
    #[case::ten_gigabits_and_many_cores(1180e6, 8.0, Some(-1))]
    #[case::nothing_comes(0.0, 1.0, None)]
    fn the_level_is_what_brings_most(#[case] link: f64, #[case] machine: f64, #[case] expected: Option<i32>) {
        assert_eq!(best(link, machine).map(|level| level.level), expected);
    }

    #[test]
    fn a_machine_is_as_fast_as_it_was_a_moment_ago() {
        let (mut machine, mut now) = (Machine::default(), Instant::now());
        for _ in 0..100 {
            now += Duration::from_millis(100);
            machine.packed(LEVELS[0], 3_980_000, Duration::from_millis(100), now);
        }
        assert!((0.09..0.11).contains(&machine.factor(now)), "{machine:?}");
        assert_eq!(machine.factor(now + BELIEVED), 1.0);
        machine.packed(LEVELS[0], 3_980_000, Duration::from_millis(5), now + BELIEVED);
        assert!(machine.factor(now + BELIEVED) > 1.9, "{machine:?}");
    }

    #[test]
    fn places_are_bounded_shared_and_given_back() {
        let one: IpAddr = "10.0.0.1".parse().unwrap();
        let compressors = Compressors::new(1);
        let mut open = Vec::new();
        while let Some(packing) = compressors.for_client(one) {
            open.push(packing);
        }
        assert_eq!(open.len(), STREAMS);
        assert!(compressors.for_peer(one, 1_000_000).is_none());
        open.truncate(1);
        let other: IpAddr = "10.0.0.2".parse().unwrap();
        // Half of one thread: too slow for a link of 200 MB/s, fast enough for one of 50.
        assert!(compressors.for_peer(other, 200_000_000).is_none());
        assert!(compressors.for_peer(other, 50_000_000).is_some());
        open.clear();
        assert!(compressors.for_peer(other, 200_000_000).is_some());
        assert!(compressors.0.state().streams.is_empty());
        assert!(Compressors::new(0).for_peer(other, 1_000_000).is_none());
    }
}
