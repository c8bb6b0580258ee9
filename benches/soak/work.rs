//! What goes on in the stores: builds, collections, and peers that come and go.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Instant;

use crate::Soak;
use crate::daemon::Daemon;
use crate::nix::{Member, Store};
use crate::tally::Random;

/// Closures that a peer keeps at once; with the next one the oldest may be collected.
const KEPT: u64 = 8;
/// Closures that are asked for: more than are kept, so that some are gone.
const ON_SHELF: usize = 10;
const PATHS: u64 = 12;
/// Of those that only the local store has: soon deleted again, so small ones.
const PATHS_ALONE: u64 = 7;
/// Blocks of 64 KiB of the large path: 8, or 48 MiB.
const LARGE: [u64; 3] = [128, 512, 768];
/// After how many closures those peers are collected that no collector is always busy with.
const COLLECT_AFTER: u64 = 5;

/// A closure that was built.
#[derive(Clone, Debug)]
pub(crate) struct Closure {
    pub(crate) top: String,
    pub(crate) members: Vec<Member>,
    /// Whether a peer has it that is never killed.
    pub(crate) is_steady: bool,
    number: u64,
}

/// Closures that can be asked for.
#[derive(Debug, Default)]
pub(crate) struct Shelf(Mutex<VecDeque<Closure>>);

impl Shelf {
    fn put(&self, closure: Closure) {
        let mut closures = self.0.lock().expect("the shelf");
        closures.push_back(closure);
        if closures.len() > ON_SHELF {
            closures.pop_front();
        }
    }

    /// Any of them.
    pub(crate) fn any(&self, random: &mut Random) -> Option<Closure> {
        let closures = self.0.lock().expect("the shelf");
        let len = closures.len() as u64;
        closures.get(usize::try_from(random.below(len.max(1))).ok()?).cloned()
    }

    /// The one that was built last.
    pub(crate) fn latest(&self) -> Option<Closure> {
        self.0.lock().expect("the shelf").back().cloned()
    }

    /// Whether it has not been replaced by a newer one in the stores that keep it.
    pub(crate) fn is_kept(&self, closure: &Closure) -> bool {
        // One less: the next one may be under way.
        self.latest().is_some_and(|latest| closure.number + KEPT - 1 > latest.number)
    }
}

/// Adds closures to two peers each, by two builds or by one and a copy, and at times to the local store too.
pub(crate) fn build_on_peers(soak: &Soak, mut random: Random) {
    for number in 0.. {
        if !soak.goes_on() {
            return;
        }
        let first = random.below(3) as usize;
        let second = (first + 1 + random.below(2) as usize) % 3;
        let (name, link) = (format!("shared-{number}"), format!("kept-{}", number % KEPT));
        let large = LARGE[random.below(3) as usize];
        let done = || -> Result<Closure, String> {
            let top = soak.peers[first].build(&name, PATHS, large, Some(&link))?;
            let members = soak.peers[first].members(&top)?;
            Ok(Closure { top, members, is_steady: first == 0 || second == 0, number })
        };
        let closure = match done() {
            Ok(closure) => closure,
            Err(error) => {
                soak.tally.not_built.one();
                soak.tally.note(format!("not built: {error}"));
                continue;
            }
        };
        soak.tally.built.one();
        let second_has_it = if random.percent(50) {
            soak.peers[second].take(&closure.top, &soak.peers[first], &link)
        } else {
            soak.peers[second].build(&name, PATHS, large, Some(&link)).map(drop)
        };
        let mut closure = closure;
        if let Err(error) = second_has_it {
            // A collector may be faster than the link that keeps what was copied.
            soak.tally.not_built.one();
            soak.tally.note(format!("not added to a second peer: {error}"));
            closure.is_steady = first == 0;
        }
        soak.shared.put(closure);
        if random.percent(40) && soak.local.build(&name, PATHS, large, None).is_err() {
            soak.tally.not_built.one();
        }
        if number % COLLECT_AFTER == 0 {
            soak.peers[1..].iter().for_each(|peer| collect_once(soak, peer));
        }
        soak.pause(random.below(1500));
    }
}

/// Adds closures to the local store alone, where they live as long as somebody asks for them.
pub(crate) fn build_alone(soak: &Soak, mut random: Random) {
    for number in 0.. {
        if !soak.goes_on() {
            return;
        }
        let done = || -> Result<Closure, String> {
            let top = soak.local.build(&format!("alone-{number}"), PATHS_ALONE, 0, Some("latest"))?;
            Ok(Closure { members: soak.local.members(&top)?, top, is_steady: false, number })
        };
        match done() {
            Ok(closure) => {
                soak.tally.built.one();
                soak.alone.put(closure);
            }
            Err(error) => {
                soak.tally.not_built.one();
                soak.tally.note(format!("not built in the local store: {error}"));
            }
        }
        soak.pause(random.below(2000));
    }
}

/// Collects a store again and again.
pub(crate) fn collect(soak: &Soak, store: &Store) {
    while soak.goes_on() {
        collect_once(soak, store);
    }
}

fn collect_once(soak: &Soak, store: &Store) {
    match store.collect() {
        Ok(deletions) => {
            soak.tally.collections.one();
            soak.tally.collected.add(deletions.len() as u64);
            if store.name == soak.local.name {
                soak.promises.deleted(deletions);
            }
        }
        Err(error) => soak.tally.note(format!("{} was not collected: {error}", store.name)),
    }
}

/// Kills one of the peers, at times the other too, and starts them again.
pub(crate) fn kill_peers(soak: &Soak, peers: &[Mutex<Daemon>], mut random: Random) {
    while soak.goes_on() {
        soak.pause(500 + random.below(4000));
        let first = random.below(peers.len() as u64) as usize;
        let killed = if random.percent(15) { peers.iter().collect() } else { vec![&peers[first]] };
        let began = Instant::now();
        for peer in &killed {
            peer.lock().expect("a peer").kill();
            soak.tally.kills.one();
        }
        soak.pause(200 + random.below(3000));
        killed.iter().for_each(|peer| peer.lock().expect("a peer").restart());
        if began.elapsed().as_secs() > 30 {
            soak.tally.note("a peer took half a minute to come back".to_owned());
        }
    }
}
