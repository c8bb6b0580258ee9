//! What the way through the local daemon costs: `cargo bench --bench relay`.
//!
//! `nix copy` into a fresh store, in turn straight from the daemon that has the paths and through a second daemon that
//! relays from the first, all on loopback: once of a closure of 300 paths of 64 KiB to 20 MiB, 1.4 GB, and once of one path of
//! 128 MiB. Prints each round, the medians and their ratios. Needs nix-bin and a machine where Nix can build in a store of its own.

#![allow(missing_docs, reason = "a program without an interface")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

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

fn main() {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let paths = build(folder);
    let holder = Daemon::start(folder, "holder", None);
    let relay = Daemon::start(folder, "relay", Some(&holder));
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
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// The real program on a port of loopback; killed when dropped.
struct Daemon {
    process: Child,
    url: String,
    public_key: String,
}

impl Daemon {
    fn start(folder: &Path, name: &str, peer: Option<&Self>) -> Self {
        let (root, state) = (folder.join(name), folder.join(format!("{name}-state")));
        std::fs::create_dir_all(&root).expect("a store");
        let mut settings = format!(
            "[discovery]\nenable = false\n[trust]\nhost_keys = false\npublic_keys = [{}]\n\
             [store]\nroot = {root:?}\n[state]\ndirectory = {state:?}\n[log]\nformat = \"json\"\n",
            peer.map(|peer| format!("{:?}", peer.public_key)).unwrap_or_default(),
        );
        settings.extend(peer.map(|peer| format!("[[peer]]\nurl = {:?}\n", peer.url)));
        let file = folder.join(format!("{name}.toml"));
        std::fs::write(&file, settings).expect("a configuration");
        let mut program = Command::new(env!("CARGO_BIN_EXE_peernix"));
        program.args(["--listen", "127.0.0.1:0", "--config"]).arg(&file).stderr(Stdio::piped());
        let mut process = program.spawn().expect("the daemon");
        let mut lines = BufReader::new(process.stderr.take().expect("its log")).lines().map_while(Result::ok);
        let mut told = |message: &str, field: &str| {
            let line = lines
                .by_ref()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(&line).ok())
                .find(|line| line["message"] == message)
                .expect("a daemon that starts");
            line[field].as_str().expect("a text").to_owned()
        };
        let url = format!("http://{}/nix-cache", told("listening", "address"));
        let public_key = told("started", "public_key");
        // Whoever stops reading would stop the daemon.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, url, public_key }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
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
fn copy(folder: &Path, path: &str, from: &Daemon) -> Duration {
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
