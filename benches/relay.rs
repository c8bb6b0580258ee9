//! What the way through the local daemon costs: `cargo bench --bench relay`.
//!
//! `nix copy` into a fresh store, in turn straight from the daemon that has the paths and through a second daemon that
//! relays from the first, all on loopback: once of a closure of 300 paths of 64 KiB to 20 MiB, 1.4 GB, and once of one path of
//! 128 MiB. Prints each round, the medians and their ratios. Needs nix-bin and a machine where Nix can build in a store of its own.

#![allow(missing_docs, reason = "a program without an interface")]

mod support;
#[path = "support/tools.rs"]
mod tools;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use support::Daemon;

const TOOLS: &[(&str, &str)] = &[("nix", "nix-bin"), ("nix-build", "nix-bin")];
const ROUNDS: usize = 7;

/// A tree of 300 paths, and one large path alone. Input-addressed, so that Nix wants signatures.
const PATHS: &str = r#"
let
  blocks = [ 1 2 4 8 16 32 64 96 160 320 ];
  build = name: blocks: below: derivation {
    inherit name below;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" ''
      block=peernix-relay-by
      for i in 1 2 3 4 5 6 7 8 9 10 11 12; do block=$block$block; done
      i=0
      echo "$below $name" > $out
      while [ $i -lt ${toString blocks} ]; do printf %s "$block"; i=$((i+1)); done >> $out
    '' ];
  };
  node = n: build "relay-bench-${toString n}" (builtins.elemAt blocks (n - n / 10 * 10))
    (map node (builtins.filter (m: m < 300) [ (2 * n + 1) (2 * n + 2) ]));
in [ (node 0) (build "relay-bench-large" 2048 null) ]
"#;

fn main() -> ExitCode {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    if !tools::are_there(TOOLS) {
        return ExitCode::FAILURE;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let paths = build(folder);
    let holder = Peer::start(folder, "holder", None);
    let relay = Peer::start(folder, "relay", Some(&holder));
    for (what, path) in ["closure of 300", "path of 128 MiB"].iter().zip(&paths) {
        let (mut straight, mut relayed) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            for (name, daemon, times) in
                [("straight", &holder, &mut straight), ("relayed", &relay, &mut relayed)]
            {
                let took = copy(folder, path, daemon);
                println!("{what}, round {round}: {name} {:.3} s", took.as_secs_f64());
                times.push(took);
            }
        }
        let (straight, relayed) = (median(&mut straight), median(&mut relayed));
        println!(
            "{what}: median straight {:.3} s, relayed {:.3} s, ratio {:.2}",
            straight.as_secs_f64(),
            relayed.as_secs_f64(),
            relayed.as_secs_f64() / straight.as_secs_f64()
        );
    }
    ExitCode::SUCCESS
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A daemon on a port of loopback, with a store of its own.
struct Peer {
    _daemon: Daemon,
    url: String,
    public_key: String,
}

impl Peer {
    /// One that knows another.
    fn start(folder: &Path, name: &str, other: Option<&Self>) -> Self {
        let root = folder.join(name);
        std::fs::create_dir_all(&root).expect("a store");
        let keys = other.map(|other| format!("{:?}", other.public_key)).unwrap_or_default();
        let mut settings =
            format!("[store]\nroot = {root:?}\n[trust]\nhost_keys = false\npublic_keys = [{keys}]\n");
        settings.extend(other.map(|other| format!("[[peer]]\nurl = {:?}\n", other.url)));
        let program = Command::new(env!("CARGO_BIN_EXE_peernix"));
        let (_daemon, address, public_key) = Daemon::start(program, folder, name, "127.0.0.1:0", &settings);
        Self { _daemon, url: format!("http://{address}/nix-cache"), public_key }
    }
}

fn nix(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("HOME", folder).env("NIX_CONF_DIR", folder);
    command.env("NIX_CONFIG", "build-users-group =").env_remove("NIX_REMOTE").env_remove("NIX_PATH");
    command
}

fn build(folder: &Path) -> Vec<String> {
    let file = folder.join("paths.nix");
    std::fs::write(&file, PATHS).expect("an expression");
    let mut build = nix("nix-build", folder);
    build.arg("--store").arg(folder.join("holder"));
    build.args(["--no-out-link", "--option", "substitute", "false", "--option", "sandbox-paths"]);
    let output =
        build.arg("/bin/sh /lib /lib64 /usr/lib").arg(file).output().expect("nix-build; install nix-bin");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}

/// Copies the closure into a store that is empty, and says how long that took.
fn copy(folder: &Path, path: &str, from: &Peer) -> Duration {
    let target = folder.join("target");
    let _ = std::fs::remove_dir_all(&target);
    let _ = std::fs::remove_dir_all(folder.join(".cache"));
    let mut copy = nix("nix", folder);
    copy.args(["--extra-experimental-features", "nix-command", "copy", "--from", &from.url, "--to"]);
    copy.arg(&target).arg(path).args(["--option", "require-sigs", "true"]);
    copy.args(["--option", "trusted-public-keys", &from.public_key]);
    let began = Instant::now();
    let output = copy.output().expect("nix");
    let took = began.elapsed();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    took
}
