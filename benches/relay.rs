//! What the way through the local daemon costs: `cargo bench --bench relay`.
//!
//! The real Nix realises the same closure into a fresh store, in turn straight from the daemon that has it and through a
//! second daemon that relays from the first, all on loopback. Prints each round, the medians and their ratio. Needs nix-bin
//! and a machine where Nix can build in a store of its own.

#![allow(missing_docs, reason = "a program without an interface")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use peernix::config::Config;
use peernix::daemon::Daemon;

const ROUNDS: usize = 7;

/// Forty paths, each of which refers to the one before: one of 128 MiB, the others of 2 MiB. Input-addressed, so that Nix
/// wants signatures.
const CLOSURE: &str = r#"
let
  build = name: blocks: before: derivation {
    inherit name before;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" ''
      block=peernix-relay-by
      for i in 1 2 3 4 5 6 7 8 9 10 11 12; do block=$block$block; done
      i=0
      echo "$before" > $out
      while [ $i -lt ${toString blocks} ]; do printf %s "$block"; i=$((i+1)); done >> $out
    '' ];
  };
  link = before: n: build "relay-bench-${toString n}" 32 before;
in builtins.foldl' link (build "relay-bench" 2048 null) (builtins.genList (n: n) 39)
"#;

fn main() {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path();
    let path = build(folder);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let holder = runtime.block_on(Daemon::start(&config(folder, "holder", None))).expect("a daemon");
    let relay = runtime.block_on(Daemon::start(&config(folder, "relay", Some(&holder)))).expect("a daemon");
    let (mut straight, mut relayed) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for (name, daemon, times) in [("straight", &holder, &mut straight), ("relayed", &relay, &mut relayed)]
        {
            let took = realise(folder, &path, daemon);
            println!("round {round}: {name} {:.3} s", took.as_secs_f64());
            times.push(took);
        }
    }
    let (straight, relayed) = (median(&mut straight), median(&mut relayed));
    println!(
        "median straight {:.3} s, relayed {:.3} s, ratio {:.2}",
        straight.as_secs_f64(),
        relayed.as_secs_f64(),
        relayed.as_secs_f64() / straight.as_secs_f64()
    );
    runtime.block_on(async { tokio::join!(relay.shutdown(), holder.shutdown()) });
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn config(folder: &Path, store: &str, peer: Option<&Daemon>) -> Config {
    let root = folder.join(store);
    std::fs::create_dir_all(&root).expect("a store");
    let mut config = Config::default();
    config.http.listen = vec![([127, 0, 0, 1], 0).into()];
    config.http.drain_time = Duration::from_secs(1);
    config.discovery.enable = false;
    config.trust.host_keys = false;
    config.store.root = Some(root);
    config.state.directory = Some(folder.join(format!("{store}-state")));
    if let Some(peer) = peer {
        config.trust.public_keys = vec![peer.public_key_line()];
        config.peer = vec![peernix::peer::ConfiguredPeer { url: url(peer) }];
    }
    config
}

fn url(daemon: &Daemon) -> String {
    format!("http://{}/nix-cache", daemon.addresses()[0])
}

fn nix(program: &str, folder: &Path, store: &str) -> Command {
    let mut command = Command::new(program);
    command.arg("--store").arg(folder.join(store)).env("HOME", folder).env("NIX_CONF_DIR", folder);
    command.env("NIX_CONFIG", "build-users-group =").env_remove("NIX_REMOTE").env_remove("NIX_PATH");
    command
}

fn build(folder: &Path) -> String {
    let file = folder.join("closure.nix");
    std::fs::write(&file, CLOSURE).expect("an expression");
    let mut build = nix("nix-build", folder, "holder");
    build.args(["--no-out-link", "--option", "substitute", "false", "--option", "sandbox-paths"]);
    let output =
        build.arg("/bin/sh /lib /lib64 /usr/lib").arg(file).output().expect("nix-build; install nix-bin");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Realises the closure into a store that is empty, and says how long that took.
fn realise(folder: &Path, path: &str, from: &Daemon) -> Duration {
    let target = folder.join("target");
    let _ = std::fs::remove_dir_all(&target);
    let _ = std::fs::remove_dir_all(folder.join(".cache"));
    let mut realise = nix("nix-store", folder, "target");
    realise.args(["--realise", path, "--max-jobs", "0", "--option", "substituters", &url(from)]);
    realise.args([
        "--option",
        "require-sigs",
        "true",
        "--option",
        "trusted-public-keys",
        &from.public_key_line(),
    ]);
    let began = Instant::now();
    let output = realise.output().expect("nix-store");
    let took = began.elapsed();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    took
}
