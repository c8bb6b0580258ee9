//! What zstd between peers is worth: `cargo bench --bench link`.
//!
//! Two hosts, each with a network of its own and a cable between them, as it is or shaped to 1 Gbit/s. One has programs and
//! libraries of this machine in its store; a client of the other gets all of them through its daemon, one NAR after the other or
//! eight at once, and discards them. In turn with zstd and without; the asking daemon is started anew each time, and finds out
//! what the link carries on one path, which is not counted. Prints the medians and their ratios. Needs root, nix-bin, iproute2 and curl.

#![allow(missing_docs, reason = "a program without an interface")]

#[path = "support/network.rs"]
mod network;
mod support;
#[path = "support/tools.rs"]
mod tools;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use network::Network;
use support::Daemon;

const TOOLS: &[(&str, &str)] = &[("nix-store", "nix-bin"), ("curl", "curl")];
const PROGRAM: &str = env!("CARGO_BIN_EXE_peernix");
/// Of the link as it is more, since they are short and little is between the two.
const ROUNDS: usize = 3;
const SHORT_ROUNDS: usize = 9;
/// Bytes of files in all, and about how many a path has.
const ALL: u64 = 600 << 20;
const PATH_SIZES: [u64; 6] = [4 << 20, 40 << 20, 1 << 20, 12 << 20, 2 << 20, 20 << 20];
const SHORTEST_FILE: u64 = 32 * 1024;
const HOLDER: &str = "10.78.0.1";

fn main() -> ExitCode {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    if !tools::are_there(&[network::TOOLS, TOOLS].concat()) {
        return ExitCode::FAILURE;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let paths = fill(folder);
    let (there, here) = (Network::new(), Network::new());
    there.run(&format!("ip link add eth0 type veth peer name eth0 netns {}", here.pid()));
    for (network, address) in [(&there, HOLDER), (&here, "10.78.0.2")] {
        network.run(&format!("ip address add {address}/24 dev eth0 && ip link set eth0 up"));
    }
    let store = format!("[store]\nroot = {:?}\n", folder.join("holder"));
    let holder = |port: u16, settings: &str| {
        let listen = format!("{HOLDER}:{port}");
        let (program, name) = (there.command(PROGRAM), format!("holder-{port}"));
        Daemon::start(program, folder, &name, &listen, &format!("{settings}{store}")).0
    };
    let _plain = holder(9998, "[limits]\ncompressors = 0\n");
    let _packed = holder(9999, "");
    for shaped in [true, false] {
        if shaped {
            there.run("tc qdisc add dev eth0 root tbf rate 1gbit burst 256k latency 50ms");
        } else {
            there.run("tc qdisc del dev eth0 root");
        }
        for connections in [1, 8] {
            let what = format!("{}, {connections} at once", if shaped { "1 Gbit/s" } else { "as it is" });
            let (mut plain, mut packed) = (Vec::new(), Vec::new());
            for round in 0..if shaped { ROUNDS } else { SHORT_ROUNDS } {
                let mut both = [("plain", 9998, &mut plain), ("zstd", 9999, &mut packed)];
                // Who goes first has no advantage in the end.
                both.rotate_left(round % 2);
                for (name, port, times) in both {
                    let (took, wire) = fetch(&here, folder, port, &paths, connections);
                    println!(
                        "{what}, round {round}: {name} {:.3} s, {:.0} MB on the wire",
                        took.as_secs_f64(),
                        wire / 1e6
                    );
                    times.push(took);
                }
            }
            let (plain, packed) = (median(&mut plain), median(&mut packed));
            println!(
                "{what}: median plain {plain:.3} s, zstd {packed:.3} s: {:.2} times as fast",
                plain / packed
            );
        }
    }
    ExitCode::SUCCESS
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Puts programs and libraries into the holder's store, several a path, and gives the hash parts.
fn fill(folder: &Path) -> Vec<String> {
    let (mut files, mut folders) = (Vec::new(), vec![PathBuf::from("/usr/bin"), PathBuf::from("/usr/lib")]);
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).expect("a folder").flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            let len = entry.metadata().map_or(0, |metadata| metadata.len());
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && len >= SHORTEST_FILE {
                files.push((entry.path(), len));
            }
        }
    }
    files.sort();
    // The same ones each time, from all over.
    fastrand::seed(7);
    fastrand::shuffle(&mut files);
    let (mut hashes, mut all, mut files) = (Vec::new(), 0, files.into_iter());
    while all < ALL {
        let size = PATH_SIZES[hashes.len() % PATH_SIZES.len()];
        let tree = folder.join(format!("programs-{}", hashes.len()));
        std::fs::create_dir(&tree).expect("a folder");
        let mut bytes = 0;
        for (number, (file, len)) in files.by_ref().enumerate() {
            std::fs::copy(&file, tree.join(number.to_string())).expect("a copy");
            bytes += len;
            if bytes >= size {
                break;
            }
        }
        if bytes == 0 {
            break;
        }
        all += bytes;
        let mut add = Command::new("nix-store");
        add.arg("--store").arg(folder.join("holder")).arg("--add").arg(&tree);
        add.env("HOME", folder).env("NIX_CONF_DIR", folder).env_remove("NIX_REMOTE");
        let path = run(&mut add);
        hashes.push(path["/nix/store/".len()..][..32].to_owned());
        std::fs::remove_dir_all(tree).expect("a folder");
    }
    println!("{} paths, {} MB of files", hashes.len(), all / 1_000_000);
    hashes
}

/// Gets all paths through a fresh daemon. Gives the time from the first narinfo to the last NAR's end, and the bytes on the wire.
fn fetch(here: &Network, folder: &Path, port: u16, hashes: &[String], connections: usize) -> (Duration, f64) {
    let settings = format!(
        "[store]\nroot = {:?}\n[trust]\nhost_keys = false\n[[peer]]\nurl = \"http://{HOLDER}:{port}/nix-cache\"\n",
        folder.join("asker")
    );
    let _ = std::fs::create_dir(folder.join("asker"));
    let (_daemon, ..) = Daemon::start(here.command(PROGRAM), folder, "asker", "127.0.0.1:9997", &settings);
    let url = |path: &str| format!("http://127.0.0.1:9997/{path}");
    let curl = || {
        let mut curl = here.command("curl");
        curl.args(["--silent", "--show-error", "--fail"]);
        curl
    };
    let (known, hashes) = hashes.split_at(1);
    let narinfo = run(curl().arg(url(&format!("{}.narinfo", known[0]))));
    let nar = narinfo.lines().find_map(|line| line.strip_prefix("URL: ")).expect("a narinfo");
    run(curl().args(["--output", "/dev/null", &url(nar)]));
    let began = Instant::now();
    let narinfos = run(curl().args(hashes.iter().map(|hash| url(&format!("{hash}.narinfo")))));
    let nars: Vec<String> = narinfos.lines().filter_map(|line| line.strip_prefix("URL: ")).map(url).collect();
    assert_eq!(nars.len(), hashes.len());
    let mut get = curl();
    if connections > 1 {
        get.args(["--parallel", "--parallel-max", &connections.to_string()]);
    }
    for nar in &nars {
        get.args(["--output", "/dev/null", nar]);
    }
    run(&mut get);
    let took = began.elapsed();
    let metrics = run(curl().arg(url("metrics")));
    let wire = metrics.lines().find_map(|line| line.strip_prefix("peernix_wire_bytes_total ")?.parse().ok());
    (took, wire.expect("a metric"))
}
