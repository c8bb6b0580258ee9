//! Ten minutes of everything at once: `cargo bench --bench soak`, or `cargo bench --bench soak -- --seconds 120 --seed 7`.
//!
//! One daemon under soak ("local") and three peers of it, each with a store of its own, all on loopback. Builders add paths to
//! the local store and to peers, collectors delete them again without pause, two of the peers are killed and come back, and
//! clients copy closures with the real Nix or ask for narinfos and NARs by hand: whole, in ranges, slowly, or leaving midway.
//! What is right is known from Nix itself, which is asked for hash and size of every path at the moment it was built.
//! Ends with 1 if one byte was wrong, one answer a 5xx or late, one narinfo of the local store kept no promise, or if the
//! daemon's descriptors or memory grew. Needs nix-bin and a machine where Nix can build in a store of its own.

#![allow(missing_docs, reason = "a program without an interface")]

mod clients;
mod daemon;
mod descriptors;
mod nix;
mod promises;
mod report;
mod tally;
mod work;

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::clients::Manner;
use crate::daemon::{Daemon, Sample};
use crate::nix::Store;
use crate::promises::Promises;
use crate::tally::{Random, Tally};
use crate::work::Shelf;

/// The shortest there is, so that collections really delete, and under requests.
const LEASE: Duration = Duration::from_secs(1);
const PEERS: usize = 3;
const COPIERS: usize = 3;
/// By hand: most of them fast, and some slow, so that peers die in the middle of their NARs.
const ASKERS: [Manner; 7] =
    [Manner::Fast, Manner::Fast, Manner::Fast, Manner::Slow, Manner::Slow, Manner::Slow, Manner::Slow];
/// What is still open after the load: connections of the pools to peers, and the processes that hold the last leases.
const REST_TIME: Duration = Duration::from_secs(30);

/// What all threads share.
struct Soak {
    tally: Tally,
    promises: Promises,
    /// Closures that were built on peers, and some of them in the local store too.
    shared: Shelf,
    /// Closures that only the local store ever had.
    alone: Shelf,
    local: Store,
    peers: Vec<Store>,
    url: String,
    key: String,
    ended: AtomicBool,
}

impl Soak {
    fn goes_on(&self) -> bool {
        !self.ended.load(Ordering::Relaxed)
    }

    /// Sleeps so long, unless it ends meanwhile.
    fn pause(&self, millis: u64) {
        let until = Instant::now() + Duration::from_millis(millis);
        while self.goes_on() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20).min(until - Instant::now()));
        }
    }
}

fn main() -> ExitCode {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    let (seconds, seed) = (option("--seconds").unwrap_or(600), option("--seed").unwrap_or(1));
    println!("soak of {seconds} s, seed {seed}");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let stores: Vec<Store> = (0..PEERS).map(|n| Store::new(folder, &format!("peer{n}"))).collect();
    let peers: Vec<Mutex<Daemon>> =
        stores.iter().map(|store| Mutex::new(Daemon::start(store, &[], &[]))).collect();
    let (urls, keys): (Vec<_>, Vec<_>) =
        peers.iter().map(|peer| peer.lock().expect("a peer")).map(|peer| (peer.url(), peer.key())).unzip();
    let store = Store::new(folder, "local");
    let local = Daemon::start(&store, &urls, &keys);
    let soak = Soak {
        tally: Tally::default(),
        promises: Promises::default(),
        shared: Shelf::default(),
        alone: Shelf::default(),
        local: store,
        peers: stores,
        url: local.url(),
        key: local.key(),
        ended: AtomicBool::new(false),
    };
    let samples = run(&soak, &local, &peers, Duration::from_secs(seconds), seed);
    let rest = rest(&local, &samples);
    let is_good = report::report(&soak, &local, &samples, &rest);
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A number behind its name on the command line.
fn option(name: &str) -> Option<u64> {
    let value = std::env::args().skip_while(|argument| argument != name).nth(1)?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}: {value:?} is no number")))
}

/// Everything at once for so long; gives what the daemon took meanwhile, first of all before anything was asked.
fn run(
    soak: &Soak,
    local: &Daemon,
    peers: &[Mutex<Daemon>],
    length: Duration,
    seed: u64,
) -> Vec<(Duration, Sample)> {
    // Each thread has its own numbers, whatever the others do.
    let random = |thread: u64| Random::new(seed.wrapping_mul(1000).wrapping_add(thread));
    let began = Instant::now();
    let mut samples = vec![(Duration::ZERO, local.sample())];
    std::thread::scope(|scope| {
        scope.spawn(|| work::build_on_peers(soak, random(1)));
        scope.spawn(|| work::build_alone(soak, random(2)));
        scope.spawn(|| work::collect(soak, &soak.local));
        scope.spawn(|| work::collect(soak, &soak.peers[0]));
        scope.spawn(|| work::kill_peers(soak, &peers[1..], random(3)));
        for copier in 0..COPIERS {
            let random = random(10 + copier as u64);
            scope.spawn(move || clients::copy(soak, copier, random));
        }
        for (asker, manner) in ASKERS.into_iter().enumerate() {
            let random = random(100 + asker as u64);
            scope.spawn(move || clients::ask(soak, manner, random));
        }
        let period = (length / 240).max(Duration::from_millis(500));
        let mut told = Instant::now();
        while began.elapsed() < length {
            std::thread::sleep(period);
            let sample = local.sample();
            if told.elapsed() > Duration::from_secs(20) {
                told = Instant::now();
                println!("{:>4} s: {sample}; {}", began.elapsed().as_secs(), soak.tally.in_short());
            }
            samples.push((began.elapsed(), sample));
        }
        soak.ended.store(true, Ordering::Relaxed);
    });
    samples
}

/// What the daemon takes when nobody asks any more: waits until it is as little as before the load, or long enough.
fn rest(local: &Daemon, samples: &[(Duration, Sample)]) -> Sample {
    let ended = Instant::now();
    loop {
        let sample = local.sample();
        if sample.descriptors <= samples[0].1.descriptors || ended.elapsed() > REST_TIME {
            return sample;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}
