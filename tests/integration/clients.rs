//! Real clients: `nix copy`, `nix-store --realise`, as root and as an unprivileged user through nix-daemon, signatures
//! required.

use crate::signatures::BUILT;
use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::host::Host;
use crate::support::http::get;
use crate::support::store::Store;
use crate::support::{eventually, run, succeed, text};

/// A closure of twenty-one built paths, each referring to the one before and to itself.
const CHAIN: &str = r#"
  let link = before: n: derivation {
    name = "link-${toString n}"; inherit before; system = builtins.currentSystem;
    builder = "/bin/sh"; args = [ "-c" "echo $before $out > $out" ]; };
  in builtins.foldl' link "end" (builtins.genList (n: n) 21)"#;

fn key(daemon: &Daemon) -> String {
    get(&daemon.url("public-key")).text().trim().to_owned()
}

fn conf(daemon: &Daemon, key: &str) -> String {
    format!("substituters = {}\ntrusted-public-keys = {key}\nrequire-sigs = true\n", daemon.substituter())
}

#[test]
fn a_closure_is_copied_and_realised_by_root_with_signatures_required() {
    let builder = Host::new("");
    let path = builder.build(CHAIN).remove(0);
    let daemon = Daemon::start(builder.command(PROGRAM), "");

    let client = Host::new(&conf(&daemon, &key(&daemon)));
    succeed(client.command("nix-store").args(["--realise", &path]));
    let requisites = |host: &Host| text(host.command("nix-store").args(["--query", "--requisites", &path]));
    assert_eq!(requisites(&client), requisites(&builder));
    succeed(client.command("nix-store").args(["--verify", "--check-contents"]));

    let other = Host::new(&conf(&daemon, &key(&daemon)));
    succeed(other.command("nix").args(["copy", "--from", &daemon.substituter(), &path]));
    assert_eq!(requisites(&other), requisites(&builder));
    // What came with a signature keeps it, and is served on with it in front.
    let second = Daemon::start(other.command(PROGRAM), "");
    let narinfo = crate::narinfo::narinfo(&second, &path);
    let signatures = crate::narinfo::field(&narinfo, "Sig").unwrap();
    let name = |key: String| key.split(':').next().unwrap().to_owned();
    let names: Vec<String> = signatures.split(' ').map(|signature| name(signature.to_owned())).collect();
    assert_eq!(names, [name(key(&daemon)), name(key(&second))]);
}

#[test]
fn an_unprivileged_user_gets_a_closure_through_nix_daemon() {
    // The server is unprivileged too: its nix-store goes through the builder's nix-daemon.
    let mut builder = Host::new("");
    let path = builder.build(CHAIN).remove(0);
    builder.start_nix_daemon();
    let program = builder.install(PROGRAM);
    let daemon = Daemon::start(builder.command_as_nobody(program), "");

    let mut client = Host::new(&conf(&daemon, &key(&daemon)));
    client.start_nix_daemon();
    succeed(client.command_as_nobody("nix-store").args(["--realise", &path]));
    succeed(client.command("nix-store").args(["--verify", "--check-contents"]));
    let requisites = text(client.command_as_nobody("nix-store").args(["--query", "--requisites", &path]));
    assert_eq!(requisites.lines().count(), 21);

    let mut other = Host::new(&conf(&daemon, &key(&daemon)));
    other.start_nix_daemon();
    succeed(other.command_as_nobody("nix").args(["copy", "--from", &daemon.substituter(), &path]));
    // The path is leased there: nix-daemon refuses to delete it.
    let delete = run(builder.command("nix-store").args(["--delete", &path]));
    assert!(!delete.status.success(), "a leased path was deleted");
}

#[test]
fn what_is_unsigned_or_wrongly_signed_is_refused() {
    let store = Store::new();
    let path = store.build(BUILT).remove(0);
    let daemon = Daemon::serve(store.root(), "");
    let (_, stranger) = crate::signatures::nix_key(&store, "stranger-1");
    // The right name on the wrong key is no better.
    let real_name = key(&daemon).split(':').next().unwrap().to_owned();
    let forged = format!("{real_name}:{}", stranger.split(':').nth(1).unwrap());
    for keys in ["", &stranger, &forged] {
        let client = Host::new(&conf(&daemon, keys));
        let refused = run(client.command("nix-store").args(["--realise", &path]));
        assert!(!refused.status.success(), "{keys:?}");
        let copied = run(client.command("nix").args(["copy", "--from", &daemon.substituter(), &path]));
        let said = String::from_utf8_lossy(&copied.stderr).into_owned();
        assert!(!copied.status.success() && said.contains("signature"), "{keys:?}: {said}");
    }
    let trusting = Host::new(&conf(&daemon, &key(&daemon)));
    succeed(trusting.command("nix-store").args(["--realise", &path]));
}

#[test]
fn try_shows_that_it_works_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut trial = std::process::Command::new(PROGRAM);
    let report = text(trial.arg("try").env("TMPDIR", folder.path()));
    for said in [
        "found each other      after",
        "paths copied         25",
        "refused with a wrong key, accepted with the right one",
        "MB/s",
    ] {
        assert!(report.contains(said), "{report}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn try_that_a_signal_ends_leaves_nothing_behind() {
    for signal in ["-INT", "-TERM"] {
        let folder = tempfile::tempdir().unwrap();
        let mut trial = std::process::Command::new(PROGRAM);
        let mut trial = trial.arg("try").env("TMPDIR", folder.path()).spawn().unwrap();
        eventually("a builder writes", || {
            let trial = std::fs::read_dir(folder.path()).unwrap().flatten().next()?.path();
            let paths = std::fs::read_dir(trial.join("first/nix/store")).ok()?.flatten();
            let mut names = paths.map(|path| path.file_name().to_string_lossy().into_owned());
            names.find(|name| name.contains("-peernix-try-data") && !name.ends_with(".drv"))
        });
        succeed(std::process::Command::new("kill").args([signal, &trial.id().to_string()]));
        assert_eq!(eventually("it ends", || trial.try_wait().unwrap()).code(), Some(1));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn try_tells_why_nix_cannot_build() {
    let folder = tempfile::tempdir().unwrap();
    let (program, forbidden) = (folder.path().join("nix-build"), "user namespaces");
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    for (said, is_forbidden) in [
        ("error: cloning builder process: Operation not permitted", true),
        ("error: builder failed;\n > no space left\nerror: 1 dependencies failed to build", false),
    ] {
        std::fs::write(&program, format!("#!/bin/sh\necho '{said}' >&2\nexit 1\n")).unwrap();
        succeed(std::process::Command::new("chmod").arg("755").arg(&program));
        let mut trial = std::process::Command::new(PROGRAM);
        let output = run(trial.arg("try").env("PATH", &path).env("TMPDIR", folder.path()));
        let told = String::from_utf8(output.stderr).unwrap().lines().last().unwrap().to_owned();
        let reason = if is_forbidden { said } else { "error: builder failed; > no space left" };
        assert!(told.starts_with(&format!("peernix: Nix can't build here: {reason}")), "{told}");
        assert_eq!(told.contains(forbidden), is_forbidden, "{told}");
    }
}

#[test]
fn try_needs_no_right_to_the_store_of_the_machine() {
    // A copy that nobody may run, in a folder of its own.
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("peernix");
    std::fs::copy(PROGRAM, &program).unwrap();
    succeed(std::process::Command::new("chown").args(["-R", "65534:65534"]).arg(folder.path()));
    let mut trial = std::process::Command::new("setpriv");
    trial.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program).arg("try");
    let report = text(trial.env("TMPDIR", folder.path()).env("HOME", folder.path()));
    assert!(report.contains("It works here."), "{report}");
}
