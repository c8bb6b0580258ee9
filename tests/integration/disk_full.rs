//! A disk that gets full under a spool: its readers go on without a file, and the space comes back.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use peernix::cache::{Begin, Piece, SpoolReader, SpoolWriter, Spools};
use peernix::nix::NarHash;

use crate::nar::many_small_files;
use crate::narinfo::{field, narinfo};
use crate::support::daemon::Daemon;
use crate::support::host::namespaces;
use crate::support::http::get;
use crate::support::scripted::{ask, honest, relaying};
use crate::support::store::{Store, isolated};
use crate::support::{eventually, succeed};

const LARGE: usize = 20 << 20;
const CHUNK: usize = 64 << 10;
/// What the disk holds, and what a spool keeps in memory, with a chunk to spare.
const HELD: usize = (1 << 20) + (4 << 20) + CHUNK;

/// A small file system in a mount namespace of its own: it ends with its process, however the test does.
struct SmallDisk {
    process: Child,
    /// As seen from outside.
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl SmallDisk {
    /// Of 1 MiB.
    fn new() -> Self {
        Self::with("size=1m")
    }

    fn with(options: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("peernix-disk-").tempdir().unwrap();
        let script = format!("mount -t tmpfs -o {options} peernix-test \"$1\"");
        let (process, inner) = namespaces(&["--mount"], &script, Some(folder.path()));
        let path = Path::new(&format!("/proc/{inner}/root")).join(folder.path().strip_prefix("/").unwrap());
        Self { process, path, _folder: folder }
    }

    fn free(&self) -> u64 {
        let disk = rustix::fs::statvfs(&self.path).unwrap();
        disk.f_bfree * disk.f_frsize
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn contents() -> Bytes {
    (0..LARGE).map(|at| (at * 31 % 251) as u8).collect()
}

async fn begin(spools: &Spools) -> Begin {
    spools.begin(&NarHash::from_digest([1; 32]), LARGE as u64, false).await
}

async fn two_readers(spools: &Spools) -> (SpoolWriter, SpoolReader, SpoolReader) {
    let Begin::Write(writer, first) = begin(spools).await else { panic!("it is there") };
    let Begin::Read(second) = begin(spools).await else { panic!("it is not joined") };
    assert!(writer.writes_to_disk());
    (writer, first, second)
}

/// Writes until it would have to wait; gives where.
fn fill(writer: &SpoolWriter, contents: &Bytes, mut at: usize) -> usize {
    while at < contents.len() && writer.room().now_or_never().is_some() {
        writer.appender().append(contents.slice(at..at + CHUNK));
        at += CHUNK;
    }
    at
}

/// Reads as long as something is there; gives up to where, and how much of it came from the file.
fn follow(reader: &mut SpoolReader, contents: &Bytes, mut at: usize) -> (usize, usize) {
    let mut from_file = 0;
    while let Some(piece) = reader.piece().now_or_never() {
        let Some(piece) = piece.unwrap() else { break };
        let is_from_file = matches!(piece, Piece::File(..));
        let bytes = piece.read().unwrap();
        assert!(contents[at..at + bytes.len()] == bytes, "other bytes from {at} on");
        from_file += if is_from_file { bytes.len() } else { 0 };
        at += bytes.len();
    }
    (at, from_file)
}

#[tokio::test]
async fn readers_of_a_spool_on_a_full_disk_get_all_of_it_the_slow_one_from_the_file_first() {
    let (disk, contents) = (SmallDisk::new(), contents());
    let empty = disk.free();
    let spools = Spools::new(Some(disk.path.clone()), 64 << 20, 2 * LARGE as u64);
    let (writer, mut slow, mut fast) = two_readers(&spools).await;
    // The slow one reads nothing until the writer waits for it.
    let (mut written, mut read) = (0, 0);
    loop {
        let before = written;
        written = fill(&writer, &contents, written);
        read = follow(&mut fast, &contents, read).0;
        if written == before {
            break;
        }
    }
    assert_eq!(read, written);
    assert!((HELD / 2..=HELD).contains(&written), "{written} bytes are kept for the slow one");
    assert!(disk.free() < CHUNK as u64 && !writer.writes_to_disk());
    let (mut behind, from_file) = follow(&mut slow, &contents, 0);
    assert_eq!(behind, written);
    assert!(from_file > CHUNK, "{from_file} bytes came from the file");
    while written < LARGE {
        written = fill(&writer, &contents, written);
        read = follow(&mut fast, &contents, read).0;
        behind = follow(&mut slow, &contents, behind).0;
        assert_eq!((read, behind), (written, written));
    }
    writer.finish();
    assert!(matches!(fast.piece().await, Ok(None)) && matches!(slow.piece().await, Ok(None)));
    drop((fast, slow));
    // Its beginning is there no more: it is not kept for whoever asks next.
    spools.sweep(Instant::now());
    assert_eq!((disk.free(), spools.taken()), (empty, (0, 0)));
}

#[tokio::test]
async fn a_disk_that_is_full_from_the_beginning_is_tried_once() {
    let (disk, contents) = (SmallDisk::new(), contents());
    let filler = vec![0; usize::try_from(disk.free()).unwrap()];
    std::fs::write(disk.path.join("filler"), filler).unwrap();
    assert_eq!(disk.free(), 0);
    let spools = Spools::new(Some(disk.path.clone()), 64 << 20, 2 * LARGE as u64);
    let (writer, first, second) = two_readers(&spools).await;
    writer.appender().append(contents.slice(..CHUNK));
    let Begin::Read(third) = begin(&spools).await else { panic!("it is not joined") };
    assert_eq!(spools.taken().1, LARGE as u64);
    let mut readers = [(first, 0), (second, 0), (third, 0)];
    let mut written = CHUNK;
    while written < LARGE {
        written = fill(&writer, &contents, written);
        for (reader, at) in &mut readers {
            *at = follow(reader, &contents, *at).0;
            assert_eq!(*at, written);
        }
    }
    writer.finish();
    drop(readers);
    assert_eq!(spools.close(Duration::ZERO).await, Ok(()));
    assert_eq!(spools.taken(), (0, 0));
}

#[test]
fn clients_of_a_daemon_whose_disk_gets_full_get_all_of_it_and_the_space_comes_back() {
    let (disk, honest) = (SmallDisk::new(), honest(LARGE));
    let settings = format!("[state]\ndirectory = {:?}\n[discovery]\nenable = false", disk.path);
    let (_store, daemon) = relaying(&honest.key, &[honest.daemon.substituter()], &settings);
    let before = disk.free();
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    let url = daemon.url(&honest.nar_url);
    let mut slow = get(&url).reader();
    let mut bytes = vec![0; 1000];
    slow.read_exact(&mut bytes).unwrap();
    // One that joins it or is too late to: either way there is a file now.
    let fast = std::thread::spawn({
        let url = url.clone();
        move || get(&url).bytes()
    });
    let said = "a download can't be spooled; its readers follow it in memory, as fast as the slowest";
    eventually("the disk is full", || (!daemon.logged(said).is_empty()).then_some(()));
    slow.read_to_end(&mut bytes).unwrap();
    assert!(bytes == honest.nar);
    assert!(fast.join().unwrap() == honest.nar);
    eventually("the space is back", || (disk.free() == before).then_some(()));
    assert_eq!(daemon.metric("peernix_relay_failovers_total"), 0.0);
    assert!(get(&url).bytes() == honest.nar);
}

#[test]
fn nars_that_a_disk_has_no_room_to_copy_are_the_same_and_the_space_comes_back() {
    // Too small for any of them, which says nothing of shorter ones; and one that has room and takes no more files.
    are_the_same_without_copies(&SmallDisk::new(), 0, |_| ());
    are_the_same_without_copies(&SmallDisk::with("size=200m,nr_inodes=300"), 1, |disk| {
        let mut names = (0..400).map(|number| disk.path.join(format!("{number}")));
        let error = names.find_map(|name| std::fs::File::create(name).err()).unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    });
}

/// Whatever is done to the disk once the daemon is there; and so often it says that nothing is copied for a while.
fn are_the_same_without_copies(disk: &SmallDisk, warnings: usize, fill: fn(&SmallDisk)) {
    let store = Store::new();
    let paths: Vec<String> = (0..3).map(|number| many_small_files(&store, number)).collect();
    let daemon = Daemon::serve(store.root(), &format!("[state]\ndirectory = {:?}", disk.path));
    fill(disk);
    let before = disk.free();
    for (number, path) in paths.iter().enumerate() {
        let expected = succeed(isolated("nix-store", store.root()).arg("--dump").arg(store.real(path)));
        let url = daemon.url(&format!("nix-cache/{}", field(&narinfo(&daemon, path), "URL").unwrap()));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert!(get(&url).bytes() == expected));
            }
        });
        eventually("the space is back", || (disk.free() == before).then_some(()));
        // The disk is as full for the next ones, which are not even begun.
        let said = daemon.logged(
            "a NAR can't be copied, and none is for a minute: is there room where state.directory lies?",
        );
        assert_eq!(said.len(), warnings, "{number}");
        assert_eq!(daemon.metric("peernix_nar_copies_bytes"), 0.0);
    }
    assert_eq!(daemon.metric("peernix_http_nar_cuts_total"), 0.0);
}
