//! The local daemon against nginx with the same NARs as files: `cargo bench --bench http`.
//!
//! Both on loopback and from a warm cache, in turn, in every round; a ratio is the median of the rounds' own. Narinfos by wrk,
//! NARs by a client that throws them away, `nix copy` into a fresh store. What NARs are made of is read anew, twice, before they
//! are measured, in the same way for both; where some of the first NAR of many small files came from the disk all the same, that
//! does not count. What such files cost the kernel alone is measured beside. nginx has a worker for each core and
//! sendfile, and is paced where the system paces what is sent; what the system has chosen is printed. Needs nix-bin, nginx-light
//! and wrk, and 7 GB in the temporary folder, which had better be no tmpfs: that can't say what is in memory, and no store lies
//! on one.
//!
//! `-- --rounds N` for other than five; `-- --only hits,misses,latency,large,middling,files,copy` for some of the rows.

#![allow(missing_docs, reason = "a program without an interface")]

mod bare;
mod client;
#[path = "../support/connection.rs"]
mod connection;
#[path = "../support/figures.rs"]
mod figures;
mod memory;
mod servers;
mod store;
mod table;
#[path = "../support/tools.rs"]
mod tools;
#[path = "../support/unit.rs"]
mod unit;

use std::collections::HashMap;
use std::process::ExitCode;
use std::time::Duration;

use bare::read_files;
use client::{Nar, nars, read, walk};
use memory::{read_anew, read_from_disk};
use servers::{Kind, Server};
use store::{Files, Store};
use table::{Table, Wanted};

/// Each program that is run, and the Debian package that has it.
const TOOLS: &[(&str, &str)] = &[
    ("nginx", "nginx-light"),
    ("wrk", "wrk"),
    ("nix", "nix-bin"),
    ("nix-build", "nix-bin"),
    ("nix-store", "nix-bin"),
    ("nix-instantiate", "nix-bin"),
];

const PARTS: &[&str] = &["hits", "misses", "latency", "large", "middling", "files", "copy"];

struct Arguments {
    rounds: usize,
    only: Vec<String>,
}

impl Arguments {
    fn parse() -> Result<Self, String> {
        let mut parsed = Self { rounds: 5, only: Vec::new() };
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        while let Some(argument) = arguments.next() {
            let value = arguments.next().ok_or(format!("{argument} needs a value"))?;
            match &*argument {
                "--rounds" => {
                    parsed.rounds = value.parse().map_err(|_| format!("{value} is not a number"))?
                }
                "--only" => parsed.only = value.split(',').map(str::to_owned).collect(),
                _ => return Err(format!("{argument} is neither --rounds nor --only")),
            }
        }
        match parsed.only.iter().find(|part| !PARTS.contains(&&***part)) {
            Some(part) => Err(format!("{part} is none of {}", PARTS.join(", "))),
            None => Ok(parsed),
        }
    }

    fn want(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| wanted == part)
    }
}

/// How often the first NAR of small files is tried until no server reads anything from the disk for it.
const WARM_TRIES: usize = 8;

/// How often a part is measured in a round, with the servers in turn: what takes less than a second varies by half.
fn passes(part: &str) -> usize {
    match part {
        "large" | "middling" => 8,
        "copy" => 5,
        _ => 3,
    }
}

fn main() -> ExitCode {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    let arguments = match Arguments::parse() {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}");
            return ExitCode::from(2);
        }
    };
    if !tools::are_there(TOOLS) {
        return ExitCode::FAILURE;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::make(folder.path());
    let mut table = Table::default();
    for round in 0..arguments.rounds {
        println!("round {} of {}", round + 1, arguments.rounds);
        // Who goes first has no advantage in the end.
        let order = if round % 2 == 0 { [Kind::Peernix, Kind::Nginx] } else { [Kind::Nginx, Kind::Peernix] };
        Round { arguments: &arguments, store: &store, order, table: &mut table }.run();
    }
    let congestion = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
    println!("\nnet.ipv4.tcp_congestion_control = {}", congestion.trim());
    table.print();
    ExitCode::SUCCESS
}

/// Servers that were asked once for the NAR of many small files.
struct First {
    servers: [Server; 2],
    nars: [HashMap<String, Nar>; 2],
    /// How fast they sent it, in MB/s. `None`: some of it came from the disk, however often it was tried.
    rates: Option<[f64; 2]>,
}

struct Round<'a> {
    arguments: &'a Arguments,
    store: &'a Store,
    order: [Kind; 2],
    table: &'a mut Table,
}

impl Round<'_> {
    fn run(&mut self) {
        let servers = self.order.map(|kind| self.start(kind));
        // All that follows is warm: each narinfo was asked for once.
        let nars = servers.each_ref().map(|server| nars(server.address, &self.store.all));
        for part in PARTS.iter().filter(|part| self.arguments.want(part)) {
            for pass in 0..passes(part) {
                for at in [pass % 2, (pass + 1) % 2] {
                    let (server, nars) = (&servers[at], &nars[at]);
                    match *part {
                        "hits" | "misses" | "latency" => self.narinfos(server, part),
                        "large" => self.large(server, nars),
                        "middling" => self.middling(server, nars),
                        "copy" => self.copy(server, nars),
                        // Has servers of its own, below.
                        _ => {}
                    }
                }
            }
        }
        let mut peaks = servers.each_ref().map(|server| server.memory("VmHWM"));
        drop(servers);
        if self.arguments.want("files") {
            for (files, streams) in self.store.files.iter().flat_map(|files| [(files, 1), (files, 8)]) {
                for pass in 0..passes("files") {
                    let taken = self.files(files, streams, [pass % 2, (pass + 1) % 2]);
                    peaks = [peaks[0].max(taken[0]), peaks[1].max(taken[1])];
                }
            }
        }
        for (kind, peak) in self.order.into_iter().zip(peaks) {
            self.table.add(kind, "resident memory, peak, MB", Wanted::Below(64.0), peak);
        }
    }

    fn start(&mut self, kind: Kind) -> Server {
        let server = Server::start(kind, self.store);
        let millis = server.first_answer.as_secs_f64() * 1e3;
        self.table.add(kind, "first 200 after the start, ms", Wanted::Below(50.0), millis);
        // What the start itself still does in the background is over by then.
        std::thread::sleep(Duration::from_millis(200));
        self.table.add(kind, "resident memory, idle, MB", Wanted::Below(20.0), server.memory("VmRSS"));
        server
    }

    fn narinfos(&mut self, server: &Server, part: &str) {
        let Store { folder, hits, misses, .. } = self.store;
        let (label, wanted, value) = match part {
            "hits" => {
                let walk = walk(folder, server.address, 16, hits, 200);
                ("narinfo hits, 16 connections, 1/s", Wanted::AtLeast(0.8), walk.requests_per_second)
            }
            "misses" => {
                let walk = walk(folder, server.address, 16, misses, 404);
                ("narinfo misses, 16 connections, 1/s", Wanted::AtLeast(0.8), walk.requests_per_second)
            }
            _ => {
                let walk = walk(folder, server.address, 1, hits, 200);
                ("narinfo, 1 connection, median, µs", Wanted::AtMost(1.3), walk.median_micros)
            }
        };
        self.table.add(server.kind, label, wanted, value);
    }

    /// Has what a server sends for a path in memory.
    fn bring_in(&self, server: &Server, nars: &HashMap<String, Nar>, hash: &str) {
        match server.kind {
            Kind::Peernix => read_anew(self.store.path_of(hash)),
            Kind::Nginx => read_anew(&self.store.file_of(&nars[hash])),
        }
    }

    /// Has what a server sends for some paths in memory, and the server used to it.
    fn warm(&self, server: &Server, nars: &HashMap<String, Nar>, hashes: &[String]) {
        hashes.iter().for_each(|hash| self.bring_in(server, nars, hash));
        read(server.address, 1, hashes.iter().map(|hash| &nars[hash]).collect());
    }

    fn large(&mut self, server: &Server, nars: &HashMap<String, Nar>) {
        let hash = &self.store.large;
        self.warm(server, nars, std::slice::from_ref(hash));
        let nar = &nars[hash];
        for (streams, times, rate_label, cpu_label) in [
            (1, 3, "NAR of 671 MB, 1 stream, MB/s", "its CPU, 1 stream, s/GB"),
            (8, 8, "NAR of 671 MB, 8 streams, MB/s", "its CPU, 8 streams, s/GB"),
        ] {
            let before = server.cpu();
            let read = read(server.address, streams, vec![nar; times]);
            let cpu = (server.cpu() - before) / read.gigabytes;
            self.table.add(server.kind, rate_label, Wanted::AtLeast(1.0), read.rate());
            self.table.add(server.kind, cpu_label, Wanted::AtMost(1.2), cpu);
        }
    }

    fn middling(&mut self, server: &Server, nars: &HashMap<String, Nar>) {
        self.warm(server, nars, &self.store.middling);
        let nars: Vec<&Nar> = self.store.middling.iter().map(|hash| &nars[hash]).collect();
        for (streams, label) in
            [(1, "NARs of 300 paths, 1 stream, MB/s"), (8, "NARs of 300 paths, 8 streams, MB/s")]
        {
            let rate = read(server.address, streams, nars.clone()).rate();
            self.table.add(server.kind, label, Wanted::AtLeast(0.9), rate);
        }
    }

    /// From servers that have just started, and then from the same again, in these turns; and how much memory each took.
    fn files(&mut self, files: &Files, streams: usize, turns: [usize; 2]) -> [f64; 2] {
        let Files { hash, each } = files;
        let s = if streams == 1 { "" } else { "s" };
        let first = format!("NAR of 20,000 files of {each}, {streams} stream{s}, MB/s");
        let again = format!("asked again, {each}, {streams} stream{s}, MB/s");
        let First { servers, nars, rates } = self.first_of_files(files, streams, turns);
        for (server, rate) in servers.iter().zip(rates.into_iter().flatten()) {
            self.table.add(server.kind, &first, Wanted::AtLeast(0.35), rate);
        }
        let mut fastest = 0.0_f64;
        for pass in 0..passes("files") {
            for at in [turns[pass % 2], turns[(pass + 1) % 2]] {
                let times = 2 * streams.max(4);
                let rate = read(servers[at].address, streams, vec![&nars[at][hash]; times]).rate();
                self.table.add(servers[at].kind, &again, Wanted::AtLeast(0.9), rate);
                if servers[at].kind == Kind::Peernix {
                    fastest = fastest.max(rate);
                }
            }
        }
        if let (1, Some(rates)) = (streams, rates) {
            let nginx = servers.iter().position(|server| server.kind == Kind::Nginx).expect("nginx");
            self.bare(files, nars[nginx][hash].size, rates[nginx], fastest);
        }
        servers.each_ref().map(|server| server.memory("VmHWM"))
    }

    /// Servers that have just started, their narinfos, and how fast each sent the first NAR. If one of them had to read from the disk then,
    /// though all was read just before, others are tried: some machines take memory back all the time, here and there, and 20,000
    /// files lie everywhere.
    fn first_of_files(&mut self, files: &Files, streams: usize, turns: [usize; 2]) -> First {
        let Files { hash, each } = files;
        let mut attempt = 1;
        loop {
            let servers = self.order.map(|kind| self.start(kind));
            let nars = servers.each_ref().map(|server| nars(server.address, std::slice::from_ref(hash)));
            // No server may be asked for the NAR before it is measured.
            for (server, nars) in servers.iter().zip(&nars) {
                self.bring_in(server, nars, hash);
            }
            let on_disk = || servers.iter().map(Server::read_from_disk).sum::<u64>();
            let (before, mut rates) = (on_disk(), [0.0; 2]);
            for at in turns {
                rates[at] = read(servers[at].address, streams, vec![&nars[at][hash]; streams]).rate();
            }
            let bytes = on_disk() - before;
            if bytes > 0 {
                println!(
                    "{bytes} bytes of the first NAR of 20,000 files of {each} came from the disk (attempt {attempt} of {WARM_TRIES})"
                );
            }
            if bytes == 0 || attempt == WARM_TRIES {
                return First { servers, nars, rates: (bytes == 0).then_some(rates) };
            }
            attempt += 1;
        }
    }

    /// What the files alone cost, in bytes of their NAR, beside nginx's rate that sent it; and with the sending behind it, as fast as the
    /// daemon ever sent the NAR: who opens them one by one for each NAR, and knows its length before, can hardly have a better ratio.
    fn bare(&mut self, files: &Files, nar_size: usize, nginx: f64, sent: f64) {
        let once = || {
            let (before, took) = (read_from_disk("self"), read_files(self.store.path_of(&files.hash)));
            (read_from_disk("self") == before, nar_size as f64 / 1e6 / took.as_secs_f64())
        };
        let mut tries = std::iter::repeat_with(once).take(WARM_TRIES);
        let Some((_, read)) = tries.find(|(is_warm, _)| *is_warm) else {
            println!(
                "the files were read from the disk in part, {WARM_TRIES} times: what they cost alone is not measured"
            );
            return;
        };
        let each = files.each;
        for (label, rate) in [
            (format!("files of {each} only opened and read, MB/s"), read),
            (
                format!("the same, {each}, and sent then as when asked again, MB/s"),
                1.0 / (1.0 / read + 1.0 / sent),
            ),
        ] {
            self.table.add(Kind::Peernix, &label, Wanted::Anything, rate);
            self.table.add(Kind::Nginx, &label, Wanted::Anything, nginx);
        }
    }

    fn copy(&mut self, server: &Server, nars: &HashMap<String, Nar>) {
        self.warm(server, nars, &self.store.middling);
        let before = server.cpu();
        let seconds = self.store.copy_from(server.address);
        self.table.add(server.kind, "nix copy of 300 paths, s", Wanted::AtMost(1.05), seconds);
        self.table.add(server.kind, "the server's CPU for that, s", Wanted::Anything, server.cpu() - before);
    }
}
