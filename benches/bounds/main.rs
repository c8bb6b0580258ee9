//! What must stay small however much there is: `cargo bench --bench bounds`.
//!
//! The first answer after a start with 100,000 paths in the store; memory with many idle connections, with clients that stop
//! reading, and with a NAR of 10 GB, served and relayed. All on loopback. Needs nix-bin, and room for 100,000 small files in the
//! temporary folder; what is long there is a hole. The 10 GB pass through the page cache.
//! `-- --only starts,idle,slow,long` measures some of it.

#![allow(missing_docs, reason = "a program without an interface")]

#[path = "../support/connection.rs"]
mod connection;
#[path = "../support/figures.rs"]
mod figures;
mod served;
mod store;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/table.rs"]
mod table;
#[path = "../support/tools.rs"]
mod tools;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use figures::median;
use rustix::process::{Resource, getrlimit, setrlimit};
use served::{Served, first_answer, nar_of};
use store::{Store, StorePath};
use table::{Table, Wanted};

const TOOLS: &[(&str, &str)] = &[("nix-store", "nix-bin")];
const PARTS: &[&str] = &["starts", "idle", "slow", "long"];
const PATHS: usize = 100_000;
const STARTS: usize = 31;
const IDLE: usize = 1000;
const SLOW: usize = 100;
/// Rounds of what asks for whole NARs.
const ROUNDS: usize = 3;
/// A NAR's chunk as the store reads it, `CHUNK` in src/store/buffers.rs.
const CHUNK_KIB: f64 = 256.0;
/// Descriptors that a connection counts for in src/http/gate.rs.
const DESCRIPTORS: f64 = 5.0;
/// Until memory says what stays.
const SETTLE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    if let Some(part) = asked_for().into_iter().flatten().find(|part| !PARTS.contains(&&**part)) {
        eprintln!("{part} is none of {}", PARTS.join(", "));
        return ExitCode::from(2);
    }
    if !tools::are_there(TOOLS) {
        return ExitCode::FAILURE;
    }
    // A thousand connections are more descriptors than many a shell allows.
    let mut descriptors = getrlimit(Resource::Nofile);
    descriptors.current = descriptors.maximum;
    setrlimit(Resource::Nofile, descriptors).expect("more descriptors");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let mut table = Table::default();
    if is_asked_for("starts") || is_asked_for("idle") || is_asked_for("slow") {
        with_many_paths(folder, &mut table);
    }
    if is_asked_for("long") {
        long(folder, &mut table);
    }
    table.print();
    ExitCode::SUCCESS
}

/// The parts that are to be measured: all, unless some are named.
fn asked_for() -> Option<Vec<String>> {
    let only = std::env::args().skip_while(|argument| argument != "--only").nth(1)?;
    Some(only.split(',').map(str::to_owned).collect())
}

fn is_asked_for(part: &str) -> bool {
    asked_for().is_none_or(|only| only.iter().any(|asked| asked == part))
}

fn with_many_paths(folder: &Path, table: &mut Table) {
    let (many, few) = (Store::new(folder, "many"), Store::new(folder, "few"));
    let paths = many.add_small(PATHS);
    println!("{PATHS} paths registered");
    if is_asked_for("starts") {
        starts(folder, table, [(&many, &paths[..]), (&few, &few.add_small(1))]);
        println!("started {STARTS} times with each store");
    }
    if is_asked_for("idle") || is_asked_for("slow") {
        // What is wanted of a slow reader counts on what a connection takes.
        let connection = idle(folder, table, &many, &paths);
        println!("{IDLE} connections were idle");
        if is_asked_for("slow") {
            slow(folder, table, connection);
            println!("{SLOW} readers stood still");
        }
    }
}

fn starts(folder: &Path, table: &mut Table, stores: [(&Store, &[StorePath]); 2]) {
    let (mut first, mut again) = (<[Vec<f64>; 2]>::default(), <[Vec<f64>; 2]>::default());
    let mut greeted = <[Vec<f64>; 2]>::default();
    let (mut version, mut names) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        for (at, (store, paths)) in stores.iter().enumerate() {
            let state = tempfile::tempdir_in(folder).expect("a folder");
            let start =
                || first_answer(folder, state.path(), store, fastrand::choice(*paths).expect("a path"));
            first[at].push(start());
            again[at].push(start());
            greeted[at].push(greeting(store));
        }
        let began = Instant::now();
        let told = stores[0].0.nix_store().arg("--version").stdout(Stdio::null()).status();
        assert!(told.expect("nix-store").success());
        version.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        assert!(std::fs::read_dir(stores[0].0.directory()).expect("a store").count() >= PATHS);
        names.push(began.elapsed().as_secs_f64() * 1e3);
    }
    table.add("first 200 after the first start, 100,000 paths, ms", &first[0], Wanted::AtMost(50.0));
    table.add("first 200 after the first start, 1 path, ms", &first[1], Wanted::Anything);
    table.add("first 200 after the next start, 100,000 paths, ms", &again[0], Wanted::AtMost(50.0));
    table.add("first 200 after the next start, 1 path, ms", &again[1], Wanted::Anything);
    table.add("reading the names of 100,000 paths, ms", &names, Wanted::Anything);
    table.add("nix-store --version, ms", &version, Wanted::Anything);
    table.add("nix-store --serve greets, 100,000 paths, ms", &greeted[0], Wanted::Anything);
    table.add("nix-store --serve greets, 1 path, ms", &greeted[1], Wanted::Anything);
}

/// How long a `nix-store --serve` takes to answer to its greeting, in ms.
fn greeting(store: &Store) -> f64 {
    let mut serve: Command = store.nix_store();
    let began = Instant::now();
    let mut serve =
        serve.arg("--serve").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("nix-store");
    let mut stdin = serve.stdin.take().expect("a pipe");
    stdin.write_all(&peernix::nix::serve::hello()).expect("a greeting");
    let mut answer = [0; 16];
    serve.stdout.take().expect("a pipe").read_exact(&mut answer).expect("an answer");
    let took = began.elapsed().as_secs_f64() * 1e3;
    drop(stdin);
    let _ = serve.wait();
    took
}

/// Gives what a connection takes, in KiB.
fn idle(folder: &Path, table: &mut Table, store: &Store, paths: &[StorePath]) -> f64 {
    let daemon = Served::start(folder, "idle", store, None);
    let paths = &paths[..IDLE];
    let mut one = daemon.connect();
    std::thread::sleep(SETTLE);
    table.add("resident memory after the start, MB", &[daemon.mb("VmRSS")], Wanted::Anything);
    for path in paths {
        nar_of(&mut one, path);
    }
    std::thread::sleep(SETTLE);
    // What is remembered of the paths is no connection's.
    let (before, before_mb) = (daemon.kib("VmRSS"), daemon.mb("VmRSS"));
    table.add("one connection has asked for 1,000 narinfos, MB", &[before_mb], Wanted::Anything);
    let mut connections = Vec::new();
    for path in paths {
        let mut client = daemon.connect();
        nar_of(&mut client, path);
        connections.push(client);
    }
    std::thread::sleep(SETTLE);
    let each = (daemon.kib("VmRSS") - before) / IDLE as f64;
    table.add("1,000 idle connections that asked once, MB", &[daemon.mb("VmRSS")], Wanted::Below(50.0));
    table.add("each of these, KiB", &[each], Wanted::Anything);
    // Nobody was turned away meanwhile.
    for (client, path) in connections.iter_mut().zip(paths) {
        nar_of(client, path);
    }
    each
}

/// Clients that begin to read and stop. `connection` is what each costs that does nothing, in KiB.
fn slow(folder: &Path, table: &mut Table, connection: f64) {
    let store = Store::new(folder, "slow");
    let file = store.add_file("file", 1 << 30);
    let files = store.add_files("files", 20_000, 16 * 1024);
    let small = store.add_files("small", 20_000, 2 * 1024);
    let middling = store.add_files("middling", 100, 66_000);
    // So many that their NAR is too long to be copied.
    let copied = peernix::http::Limits::default().nar_copies.as_u64() / 4;
    let short = store.add_files("short", copied as usize / 6_000 + 1, 6_000);
    // What is in memory as one long file is sent by the kernel, and holds no chunk.
    for (what, path) in [
        ("a file of 1 GiB", &file),
        ("20,000 files of 16 KiB", &files),
        ("20,000 files of 2 KiB", &small),
        ("100 files of 66,000 bytes", &middling),
        ("uncopied files of 6,000 bytes", &short),
    ] {
        let daemon = Served::start(folder, "slow", &store, None);
        // The first one finds what no other has to.
        let read = |clients: &mut Vec<connection::Client>| {
            let mut client = daemon.connect();
            let nar = nar_of(&mut client, path);
            assert_eq!(client.ask(&nar).expect("an answer").status, 200);
            clients.push(client);
        };
        let mut clients = Vec::new();
        read(&mut clients);
        std::thread::sleep(SETTLE);
        let (before, open_before) = (daemon.kib("VmRSS"), daemon.descriptors());
        (0..SLOW).for_each(|_| read(&mut clients));
        std::thread::sleep(SETTLE);
        let each = (daemon.kib("VmRSS") - before) / SLOW as f64;
        let label = format!("resident memory of each of 100 readers that stopped, {what}, KiB");
        table.add(&label, &[each], Wanted::AtMost(CHUNK_KIB + connection));
        let each = (daemon.descriptors() - open_before) as f64 / SLOW as f64;
        table.add(&format!("descriptors of each, {what}"), &[each], Wanted::AtMost(DESCRIPTORS));
    }
}

/// Peaks of memory with NARs of three sizes, of who has them and of who relays them.
fn long(folder: &Path, table: &mut Table) {
    let (store, empty) = (Store::new(folder, "long"), Store::new(folder, "empty"));
    let sizes = [("10 MB", 10_000_000), ("250 MB", 250_000_000), ("10 GB", 10_000_000_000)];
    let paths = sizes.map(|(name, size)| (name, size, store.add_file(&name.replace(' ', "-"), size)));
    println!("NARs of {} hashed", sizes.map(|(name, _)| name).join(", "));
    let relay_memory = peernix::http::Limits::default().relay_memory.as_u64() as f64 / 1e6;
    let (mut served, mut relayed) = (<[Vec<f64>; 3]>::default(), <[Vec<f64>; 3]>::default());
    for _ in 0..ROUNDS {
        for (at, (name, size, path)) in paths.iter().enumerate() {
            // Each with a daemon that has done nothing else.
            let holder = Served::start(folder, "holder", &store, None);
            read_whole(&holder, name, *size, path);
            served[at].push(holder.mb("VmHWM"));
            let relay = Served::start(folder, "relay", &empty, Some(&holder));
            read_whole(&relay, name, *size, path);
            relayed[at].push(relay.mb("VmHWM"));
        }
    }
    for (what, peaks) in [("served", &served), ("relayed", &relayed)] {
        for ((name, ..), peaks) in paths.iter().zip(peaks) {
            table.add(&format!("NAR of {name} {what}, peak, MB"), peaks, Wanted::Anything);
        }
        let middle = |at: usize| median(peaks[at].iter().copied());
        let ratio = format!("{what}: 10 GB against 10 MB");
        table.add(&ratio, &[middle(2) / middle(0)], Wanted::AtMost(1.25));
        let ratio = format!("{what}: 10 GB against 250 MB");
        table.add(&ratio, &[middle(2) / middle(1)], Wanted::Anything);
        let most = peaks[2].iter().copied().fold(0.0, f64::max);
        let label = format!("{what}: the highest peak of 10 GB over the median of 10 MB, MB");
        // All that may be kept for NARs on their way, however many.
        let wanted = if what == "relayed" { Wanted::AtMost(relay_memory) } else { Wanted::Anything };
        table.add(&label, &[most - middle(0)], wanted);
    }
}

fn read_whole(daemon: &Served, name: &str, size: u64, path: &StorePath) {
    let mut client = daemon.connect();
    let nar = nar_of(&mut client, path);
    let began = Instant::now();
    let answer = client.ask(&nar).expect("an answer");
    assert!(answer.status == 200 && answer.length as u64 > size, "{} for {nar}", answer.status);
    client.discard(&answer).expect("a whole NAR");
    println!("{name} in {:.2} s", began.elapsed().as_secs_f64());
}
