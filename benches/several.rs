//! What a second holder is worth: `cargo bench --bench several`, as root.
//!
//! Three hosts on a bridge, each in a network namespace of its own; two of them have a path of 128 MiB. The third fetches its
//! NAR through its daemon, in turn with both holders alive and with one alone: once with what each holder sends shaped to 100 Mbit/s,
//! once unshaped, where a second one can gain little and must not cost anything. Prints each round, the medians and their
//! ratios. Needs nix-bin, iproute2 and curl.

#![allow(missing_docs, reason = "a program without an interface")]

#[path = "support/network.rs"]
mod network;
mod support;
#[path = "support/tools.rs"]
mod tools;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use network::Network;
use support::Daemon;

const TOOLS: &[(&str, &str)] = &[("nix-store", "nix-bin"), ("curl", "curl")];
const ROUNDS: usize = 5;
const SIZE: usize = 128 << 20;
const NETWORK: &str = "10.78.0";

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
    let lan = Lan::new();
    let path = ["one", "two"].map(|name| add(folder, name)).into_iter().next().expect("a path");
    for (what, is_shaped) in [("100 Mbit/s each", true), ("unshaped", false)] {
        let (mut both, mut one) = (Vec::new(), Vec::new());
        for holder in 1..=2 {
            lan.shape(holder, is_shaped);
        }
        for round in 0..ROUNDS {
            for (name, holders, times) in [("both", 2, &mut both), ("one", 1, &mut one)] {
                let took = fetch(folder, &lan, &path, holders);
                println!("{what}, round {round}: {name} {:.3} s", took.as_secs_f64());
                times.push(took);
            }
        }
        let (both, one) = (median(&mut both), median(&mut one));
        println!("{what}: median from both {both:.3} s, from one {one:.3} s, ratio {:.3}", both / one);
    }
    ExitCode::SUCCESS
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// Starts the daemons anew, so that nobody remembers anything, and fetches the NAR once.
fn fetch(folder: &Path, lan: &Lan, path: &str, holders: usize) -> Duration {
    let mut daemons = Vec::new();
    for (number, name) in ["one", "two"].iter().enumerate().take(holders) {
        daemons.push(daemon(folder, lan, name, number + 1, ""));
    }
    let peers: String = (1..=holders)
        .map(|number| format!("[[peer]]\nurl = \"http://{NETWORK}.{number}:9999/nix-cache\"\n"))
        .collect();
    let settings = format!("[trust]\nhost_keys = false\nunsigned = \"relay\"\n{peers}");
    daemons.push(daemon(folder, lan, "fetching", 3, &settings));
    let hash = &path["/nix/store/".len()..][..32];
    let narinfo = lan.curl(3, &format!("http://127.0.0.1:9999/nix-cache/{hash}.narinfo"), None);
    let narinfo = String::from_utf8(narinfo).expect("a narinfo");
    let url = narinfo.lines().find_map(|line| line.strip_prefix("URL: ")).expect("a narinfo with a URL");
    let target = folder.join("nar");
    let began = Instant::now();
    lan.curl(3, &format!("http://127.0.0.1:9999/nix-cache/{url}"), Some(&target));
    let took = began.elapsed();
    let len = std::fs::metadata(&target).expect("a NAR").len();
    assert!(len > SIZE as u64, "{len} bytes");
    took
}

/// Puts the path into a store of its own. Content-addressed, so that it is one path in both.
fn add(folder: &Path, name: &str) -> String {
    let (root, file) = (folder.join(name), folder.join("several-bench"));
    std::fs::create_dir_all(&root).expect("a store");
    let mut random = fastrand::Rng::with_seed(1);
    let mut contents = std::io::BufWriter::new(std::fs::File::create(&file).expect("a file"));
    for _ in 0..SIZE / 8 {
        contents.write_all(&random.u64(..).to_le_bytes()).expect("a file");
    }
    drop(contents);
    let mut add = Command::new("nix-store");
    add.env("HOME", folder).env("NIX_CONF_DIR", folder).env("NIX_CONFIG", "build-users-group =");
    add.env_remove("NIX_REMOTE").arg("--store").arg(&root).arg("--add").arg(&file);
    let told = add.output().expect("nix-store; install nix-bin");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    String::from_utf8_lossy(&told.stdout).trim().to_owned()
}

/// A bridge and three hosts on it.
struct Lan {
    _bridge: Network,
    hosts: Vec<Network>,
}

impl Lan {
    fn new() -> Self {
        let bridge = Network::new();
        bridge.run("ip link add br0 type bridge && ip link set br0 up");
        let mut hosts = Vec::new();
        for number in 1..=3 {
            let host = Network::new();
            let cable = format!("ip link add cable{number} type veth peer name eth0 netns {}", host.pid());
            bridge.run(&format!("{cable} && ip link set cable{number} master br0 up"));
            host.run(&format!("ip address add {NETWORK}.{number}/24 dev eth0 && ip link set eth0 up"));
            hosts.push(host);
        }
        Self { _bridge: bridge, hosts }
    }

    fn host(&self, number: usize) -> &Network {
        &self.hosts[number - 1]
    }

    fn shape(&self, number: usize, is_shaped: bool) {
        let script = if is_shaped {
            "tc qdisc add dev eth0 root tbf rate 100mbit burst 64k latency 50ms"
        } else {
            "tc qdisc del dev eth0 root"
        };
        self.host(number).run(script);
    }

    fn curl(&self, number: usize, url: &str, target: Option<&Path>) -> Vec<u8> {
        let mut curl = self.host(number).command("curl");
        curl.args(["--silent", "--show-error", "--fail", "--max-time", "120", url]);
        if let Some(target) = target {
            curl.arg("--output").arg(target);
        }
        let told = curl.output().expect("curl");
        assert!(told.status.success(), "{url}: {}", String::from_utf8_lossy(&told.stderr));
        told.stdout
    }
}

/// The daemon of a host, with a store of its own.
fn daemon(folder: &Path, lan: &Lan, name: &str, number: usize, settings: &str) -> Daemon {
    let root = folder.join(name);
    std::fs::create_dir_all(&root).expect("a store");
    let program = lan.host(number).command(env!("CARGO_BIN_EXE_peernix"));
    Daemon::start(program, folder, name, "0.0.0.0:9999", &format!("[store]\nroot = {root:?}\n{settings}")).0
}
