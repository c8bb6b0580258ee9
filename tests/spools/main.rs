//! Spools with real files: whoever reads gets what was written, closing waits for all who are inside, and nothing is left.
//!
//! Files of spools have no names, so what is left of one is a descriptor. The descriptors of a folder of its own are counted,
//! since tests may run in one process.

mod rounds;

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fastrand::Rng;
use futures_util::FutureExt as _;
use peernix::cache::{Begin, Piece, Prepare, SpoolReader, SpoolWriter, Spools};
use peernix::nix::NarHash;
use tempfile::TempDir;
use tokio::task::yield_now;
use tokio::time::timeout;

/// Far more than any of this takes, on a machine that is busy too.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a spool may keep in memory beside its file, and what may be on its way, with something to spare.
const MEMORY: usize = 5 << 20;
const CHUNK: usize = 256 << 10;

/// Each round has another part of it: one that reads another's file is found out.
static CONTENTS: LazyLock<Bytes> = LazyLock::new(|| {
    let mut contents = vec![0; 32 << 20];
    Rng::with_seed(1).fill(&mut contents);
    contents.into()
});

fn nar(number: u8) -> NarHash {
    NarHash::from_digest([number; 32])
}

/// Open files below a folder, and names in it.
fn left_in(folder: &Path) -> (usize, usize) {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let open =
        open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).filter(|file| file.starts_with(folder));
    (open.count(), std::fs::read_dir(folder).unwrap().count())
}

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("peernix-spools-").tempdir().unwrap()
}

async fn begun(spools: &Spools, number: u8, size: usize, whole: bool) -> (SpoolWriter, SpoolReader) {
    match spools.begin(&nar(number), size as u64, whole).await {
        Begin::Write(writer, reader) => (writer, reader),
        other => panic!("{other:?}"),
    }
}

async fn joined(spools: &Spools, number: u8, size: usize) -> SpoolReader {
    match spools.begin(&nar(number), size as u64, false).await {
        Begin::Read(reader) => reader,
        other => panic!("{other:?}"),
    }
}

/// Memory for whole windows.
const PLENTY: u64 = 64 << 20;

/// Reads as long as something is there; gives how much that was, and whether some of it came from the file.
async fn follow(reader: &mut SpoolReader, from: usize) -> (usize, bool) {
    let (mut at, mut is_from_file) = (from, false);
    while let Some(Ok(Some(piece))) = reader.piece().now_or_never() {
        is_from_file |= matches!(piece, Piece::File(..));
        let bytes = piece.read().unwrap();
        assert!(CONTENTS[at..at + bytes.len()] == bytes, "other bytes from {at} on");
        at += bytes.len();
    }
    (at - from, is_from_file)
}

/// Writes until it would have to wait, or all of it.
fn fill(writer: &SpoolWriter, from: usize, total: usize) -> usize {
    let mut at = from;
    while at < total && writer.room().now_or_never().is_some() {
        let end = (at + CHUNK).min(total);
        writer.appender().append(CONTENTS.slice(at..end));
        at = end;
    }
    at - from
}

/// Downloads one that two read, which is what a file is made for.
async fn spooled(spools: &Spools, number: u8, size: usize) {
    let (writer, mut first) = begun(spools, number, size, false).await;
    let _second = joined(spools, number, size).await;
    assert_eq!(fill(&writer, 0, size), size);
    writer.finish();
    assert_eq!(follow(&mut first, 0).await.0, size);
}

#[tokio::test]
async fn closing_names_the_deadline_and_who_still_reads_reads_on() {
    let (folder, size) = (folder(), 8 << 20);
    let spools = Spools::new(Some(folder.path().to_owned()), PLENTY, size as u64);
    let (writer, mut slow) = begun(&spools, 1, size, false).await;
    let another = joined(&spools, 1, size).await;
    assert_eq!(fill(&writer, 0, size), size);
    writer.finish();
    drop(another);

    let (began, within) = (Instant::now(), Duration::from_millis(70));
    let late = spools.close(within).await.unwrap_err();
    assert!(began.elapsed() >= within);
    assert_eq!((late.readers, late.waited), (1, within));
    assert_eq!(late.to_string(), "1 readers had not left the spool after 70ms");
    // It is not forgotten for having been waited for in vain.
    assert_eq!(spools.close(Duration::ZERO).await.unwrap_err().readers, 1);

    assert_eq!((left_in(folder.path()), spools.taken()), ((1, 0), (0, size as u64)));
    assert_eq!(follow(&mut slow, 0).await, (size, true));
    assert!(matches!(slow.piece().await, Ok(None)));
    drop(slow);
    assert_eq!((left_in(folder.path()), spools.taken()), ((0, 0), (0, 0)));
    assert_eq!(spools.close(Duration::ZERO).await, Ok(()));
}

#[tokio::test]
async fn closing_waits_for_who_reads_what_another_download_has_replaced() {
    let (folder, size) = (folder(), 2 * MEMORY);
    let spools = Spools::new(Some(folder.path().to_owned()), PLENTY, size as u64);
    let (writer, mut ahead) = begun(&spools, 1, size, false).await;
    fill(&writer, 0, CHUNK);
    assert_eq!(follow(&mut ahead, 0).await.0, CHUNK);
    // Too late for the beginning of that one.
    drop(begun(&spools, 1, size, false).await);
    assert_eq!(spools.close(Duration::ZERO).await.unwrap_err().readers, 1);
    drop(ahead);
    assert_eq!(spools.close(Duration::ZERO).await, Ok(()));
}

#[tokio::test]
async fn who_waits_for_memory_is_told_of_the_end() {
    let spools = Spools::new(None, 1, 0);
    let _in_the_way = begun(&spools, 1, 1, true).await;
    let waiting = tokio::spawn({
        let spools = spools.clone();
        async move { spools.begin(&nar(2), 1, true).await }
    });
    yield_now().await;
    assert!(!waiting.is_finished());
    assert_eq!(spools.close(Duration::ZERO).await.unwrap_err().readers, 1);
    assert!(matches!(timeout(PATIENCE, waiting).await.unwrap().unwrap(), Begin::Closed));
}

#[tokio::test]
async fn without_a_file_the_writer_waits_for_the_slowest_and_with_one_it_does_not() {
    let size = 4 * MEMORY;
    let alone = Spools::new(None, 0, 0);
    let (writer, mut slow) = begun(&alone, 1, size, false).await;
    let held = fill(&writer, 0, size);
    assert!(held <= MEMORY, "{held} bytes are in memory");
    assert_eq!(follow(&mut slow, 0).await.0, held);
    assert_eq!(fill(&writer, held, size), held);

    let folder = folder();
    let spools = Spools::new(Some(folder.path().to_owned()), PLENTY, size as u64);
    let (writer, mut slow) = begun(&spools, 1, size, false).await;
    let mut fast = joined(&spools, 1, size).await;
    assert_eq!(fill(&writer, 0, size / 2), size / 2);
    assert_eq!(follow(&mut fast, 0).await.0, size / 2);
    assert_eq!(follow(&mut slow, 0).await, (size / 2, true));
    assert_eq!(fill(&writer, size / 2, size), size / 2);
    assert_eq!(follow(&mut slow, size / 2).await.0, size / 2);
}

#[tokio::test]
async fn the_least_recently_used_file_goes_when_the_disk_is_needed_and_no_other() {
    let (folder, size) = (folder(), 3 * CHUNK);
    let spools = Spools::new(Some(folder.path().to_owned()), PLENTY, 2 * size as u64);
    let there =
        |numbers: &[u8]| numbers.iter().map(|n| spools.len_of(&nar(*n)).is_some()).collect::<Vec<_>>();
    // It is the oldest, and takes no disk.
    let (writer, reader) = begun(&spools, 9, size, true).await;
    fill(&writer, 0, size);
    writer.finish();
    drop(reader);
    spooled(&spools, 1, size).await;
    spooled(&spools, 2, size).await;
    drop(joined(&spools, 1, size).await);
    spooled(&spools, 3, size).await;
    assert_eq!(there(&[9, 1, 2, 3]), [true, true, false, true]);
    assert_eq!((left_in(folder.path()), spools.taken()), ((2, 0), (size as u64, 2 * size as u64)));

    // What is read does not go: the fourth goes on without a file.
    let mut first = joined(&spools, 1, size).await;
    let third = joined(&spools, 3, size).await;
    spooled(&spools, 4, size).await;
    assert_eq!((there(&[9, 1, 3, 4]), left_in(folder.path())), (vec![true, true, true, false], (2, 0)));
    assert_eq!(follow(&mut first, 0).await, (size, true));
    drop((first, third));
    spools.sweep(Instant::now() + PATIENCE);
    assert_eq!((left_in(folder.path()), spools.taken()), ((0, 0), (0, 0)));
}

#[tokio::test]
async fn the_least_recently_used_goes_when_memory_is_needed_and_no_file_does() {
    let (folder, size) = (folder(), 3 * CHUNK);
    let spools = Spools::new(Some(folder.path().to_owned()), 4 * size as u64, size as u64);
    let kept = async |number| {
        let (writer, mut reader) = begun(&spools, number, size, true).await;
        fill(&writer, 0, size);
        writer.finish();
        assert_eq!(follow(&mut reader, 0).await, (size, false));
    };
    spooled(&spools, 9, size).await;
    for number in 1..=4 {
        kept(number).await;
    }
    drop(joined(&spools, 1, size).await);
    kept(5).await;
    let there = [9, 1, 2, 3].map(|number| spools.len_of(&nar(number)).is_some());
    assert_eq!(there, [true, true, false, true]);
    assert_eq!(spools.taken(), (4 * size as u64, size as u64));
    // What comes ahead of its first reader is not given up for what does so too, and takes half of all at most.
    let prepared = [6, 7].map(|number| match spools.prepare(&nar(number), size as u64) {
        Prepare::Write(writer) => writer,
        other => panic!("{other:?}"),
    });
    for writer in prepared {
        fill(&writer, 0, size);
        writer.finish();
    }
    assert!(matches!(spools.prepare(&nar(8), size as u64), Prepare::NoRoom));
    assert_eq!([6, 7].map(|number| spools.len_of(&nar(number))), [Some(size as u64); 2]);
}
