//! Rounds: one download, many readers, and an end at any moment, all decided by a seed.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use fastrand::Rng;
use futures_util::FutureExt as _;
use futures_util::future::join_all;
use peernix::cache::{Begin, Prepare, SpoolError, SpoolReader, SpoolWriter, Spools};
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio::task::{JoinSet, spawn_blocking, yield_now};
use tokio::time::timeout;

use crate::{CONTENTS, PATIENCE, folder, left_in, nar};

/// One download, its readers and its end, all decided by a seed.
struct Round {
    seed: u64,
    spools: Spools,
    contents: Bytes,
    chunk: usize,
    whole: bool,
    /// The writer fails before this chunk, or is dropped.
    fails: Option<(usize, bool)>,
    /// Closing begins after so many pieces that were written and read.
    closes: usize,
    happened: AtomicUsize,
    moment: Notify,
    is_closing: AtomicBool,
    inside: AtomicUsize,
}

impl Round {
    fn new(seed: u64, folder: &Path, most: usize) -> (Arc<Self>, Rng) {
        let mut random = Rng::with_seed(seed);
        let total = random.usize(1..=most);
        let start = random.usize(..CONTENTS.len() - total);
        let chunk = random.usize(total.div_ceil(40)..=total);
        let chunks = total.div_ceil(chunk);
        // For one, so that whoever begins anew waits; for none, so that they share what is in memory; for some.
        let disk = random.usize(..3) * total;
        let round = Self {
            seed,
            spools: Spools::new(Some(folder.to_owned()), total as u64, disk as u64),
            contents: CONTENTS.slice(start..start + total),
            chunk,
            whole: random.u8(..4) == 0,
            fails: (random.u8(..3) == 0).then(|| (random.usize(..=chunks), random.bool())),
            closes: random.usize(..chunks * 8),
            happened: AtomicUsize::new(0),
            moment: Notify::new(),
            is_closing: AtomicBool::new(false),
            inside: AtomicUsize::new(0),
        };
        (Arc::new(round), random)
    }

    async fn begin(&self) -> Begin {
        self.spools.begin(&nar(1), self.contents.len() as u64, self.whole).await
    }

    fn happens(&self) {
        if self.happened.fetch_add(1, Ordering::SeqCst) == self.closes {
            self.moment.notify_one();
        }
    }

    async fn write(self: Arc<Self>, writer: SpoolWriter, fails: Option<(usize, bool)>, mut random: Rng) {
        let chunks = (0..self.contents.len()).step_by(self.chunk);
        let chunks = chunks.map(|at| self.contents.slice(at..(at + self.chunk).min(self.contents.len())));
        // Without a word at the end all is as if bytes were missing.
        for (number, chunk) in chunks.map(Some).chain([None]).enumerate() {
            match fails {
                Some((at, true)) if at == number => return writer.fail("as the seed says"),
                Some((at, false)) if at == number => return,
                _ => {}
            }
            let Some(chunk) = chunk else { break };
            if writer.room().await.is_err() {
                return;
            }
            let appender = writer.appender();
            if writer.writes_to_disk() && random.bool() {
                spawn_blocking(move || appender.append(chunk)).await.unwrap();
            } else {
                appender.append(chunk);
            }
            self.happens();
        }
        writer.finish();
    }

    /// Reads to the end, to the failure, or until it has enough.
    async fn read(self: Arc<Self>, mut reader: SpoolReader, enough: usize, mut random: Rng) {
        self.inside.fetch_add(1, Ordering::SeqCst);
        let (seed, total, mut got) = (self.seed, self.contents.len(), 0);
        assert_eq!(reader.total(), total as u64);
        while got < enough {
            // What is asked for may be dropped before it comes.
            let asked = if random.bool() { reader.piece().now_or_never() } else { None };
            let piece = match asked {
                Some(piece) => piece,
                None => reader.piece().await,
            };
            match piece {
                Ok(Some(piece)) => {
                    let bytes = piece.read().unwrap();
                    let expected = self.contents.get(got..got + bytes.len());
                    assert!(expected == Some(&bytes[..]), "other bytes from {got} on, seed {seed}");
                    got += bytes.len();
                    self.happens();
                }
                Ok(None) => {
                    assert_eq!(got, total, "an end before the end, seed {seed}");
                    break;
                }
                Err(SpoolError::Failed(why)) => {
                    assert!(self.fails.is_some(), "{why} after {got} of {total}, seed {seed}");
                    break;
                }
                Err(error) => panic!("{error}, seed {seed}"),
            }
            if random.u8(..4) == 0 {
                yield_now().await;
            }
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    /// Comes at some time, also after a failure, or after all is closed.
    async fn come_later(self: Arc<Self>, mut random: Rng) {
        for _ in 0..random.u8(..40) {
            yield_now().await;
        }
        match self.begin().await {
            Begin::Read(reader) => self.read(reader, usize::MAX, random).await,
            Begin::Write(writer, reader) => {
                let writing = Arc::clone(&self).write(writer, None, random.fork());
                tokio::join!(writing, self.read(reader, usize::MAX, random));
            }
            Begin::Closed => assert!(self.is_closing.load(Ordering::SeqCst), "seed {}", self.seed),
        }
    }

    async fn close(self: Arc<Self>) {
        self.moment.notified().await;
        self.is_closing.store(true, Ordering::SeqCst);
        let closed = self.spools.close(PATIENCE).await;
        assert_eq!((closed, self.inside.load(Ordering::SeqCst)), (Ok(()), 0), "seed {}", self.seed);
        assert_eq!(self.spools.taken(), (0, 0), "seed {}", self.seed);
        assert!(matches!(self.begin().await, Begin::Closed), "seed {}", self.seed);
        assert!(
            matches!(self.spools.prepare(&nar(2), 0), Prepare::NoRoom)
                && self.spools.len_of(&nar(1)).is_none()
        );
    }

    async fn run(seed: u64, folder: Arc<TempDir>, most: usize, readers: usize) {
        let (round, mut random) = Self::new(seed, folder.path(), most);
        let Begin::Write(writer, first) = round.begin().await else { panic!("it is there, seed {seed}") };
        let mut inside = vec![first];
        for _ in 1..random.usize(1..=readers) {
            let Begin::Read(reader) = round.begin().await else { panic!("it is not joined, seed {seed}") };
            inside.push(reader);
        }
        let mut tasks = JoinSet::new();
        for reader in inside {
            let enough = if random.u8(..4) == 0 { random.usize(..most) } else { usize::MAX };
            tasks.spawn(Arc::clone(&round).read(reader, enough, random.fork()));
        }
        tasks.spawn(Arc::clone(&round).write(writer, round.fails, random.fork()));
        for _ in 0..readers / 8 {
            tasks.spawn(Arc::clone(&round).come_later(random.fork()));
        }
        let closing = tokio::spawn(Arc::clone(&round).close());
        let all = async {
            while let Some(ended) = tasks.join_next().await {
                ended.unwrap();
            }
            round.moment.notify_one();
            closing.await.unwrap();
        };
        timeout(PATIENCE, all).await.unwrap_or_else(|_| panic!("it hangs, seed {seed}"));
    }
}

/// Some rounds at a time; after each time nothing is left.
async fn rounds(times: u64, at_once: u64, most: usize, readers: usize) {
    let seed: u64 = match std::env::var("PEERNIX_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => fastrand::u32(..).into(),
    };
    println!("PEERNIX_TEST_SEED={seed}");
    let (began, folder) = (Instant::now(), Arc::new(folder()));
    for time in 0..times {
        let seeds = (0..at_once).map(|number| seed + time * at_once + number);
        let rounds = seeds.map(|seed| tokio::spawn(Round::run(seed, Arc::clone(&folder), most, readers)));
        join_all(rounds).await.into_iter().for_each(|round| round.unwrap());
        assert_eq!(left_in(folder.path()), (0, 0), "after the seeds from {} on", seed + time * at_once);
    }
    println!("{} rounds in {:?}", times * at_once, began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixty_four_readers_and_a_writer_while_it_closes_at_any_moment() {
    rounds(3000, 4, 64 << 10, 64).await;
}

/// Larger than what is kept in memory: the slow read the file while it grows, and a writer without one waits for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_of_more_than_memory_holds_while_it_closes_at_any_moment() {
    rounds(200, 2, 12 << 20, 8).await;
}
