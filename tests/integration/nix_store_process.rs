//! The `nix-store --serve` process: absent, killed, stopped, replaced.

use std::time::{Duration, Instant};

use crate::narinfo::hash_part;
use crate::support::daemon::Daemon;
use crate::support::http::get;
use crate::support::store::Store;
use crate::support::{eventually, run, succeed, text};

fn signal(pid: u32, signal: &str) {
    succeed(std::process::Command::new("kill").args([signal, &pid.to_string()]));
}

fn status(daemon: &Daemon, path: &str) -> u16 {
    get(&daemon.url(&format!("{}.narinfo", hash_part(path)))).status
}

#[test]
fn without_nix_the_daemon_starts_says_so_once_and_answers_404() {
    let store = Store::new();
    let path = store.add_text("text", "text");
    let settings = "nix_store = \"/nowhere/nix-store\"";
    let daemon = Daemon::serve(store.root(), settings);
    let began = Instant::now();
    for _ in 0..200 {
        assert_eq!(status(&daemon, &path), 404);
    }
    assert!(began.elapsed() < Duration::from_secs(10), "a 404 was not fast");
    assert_eq!(get(&daemon.url("nix-cache-info")).status, 200);
    let once = "the local store can't be asked; its paths are answered with 404";
    eventually("it says so", || daemon.log().iter().any(|line| line.contains(once)).then_some(()));
    let said = daemon.log().join("\n");
    assert_eq!(said.matches(once).count(), 1, "{said}");
    assert!(said.contains("/nowhere/nix-store was not found: install Nix, or set store.nix_store"), "{said}");
    let health = get(&daemon.url("health")).text();
    assert!(health.contains("unavailable") && health.contains("\"status\":\"degraded\""), "{health}");
    assert!(daemon.log().iter().filter(|line| line.contains("\"WARN\"")).count() < 5, "{said}");
}

#[test]
fn without_a_store_directory_the_daemon_starts_and_finds_the_store_when_it_comes() {
    let store = Store::new();
    let path = store.add_text("text", "text");
    let (hidden, shown) = (store.root().join("nix/hidden"), store.directory());
    std::fs::rename(&shown, &hidden).unwrap();
    let daemon = Daemon::serve(store.root(), "");
    assert_eq!(status(&daemon, &path), 404);
    // nix-store makes the folder when it starts; the paths come back by a rename.
    let _ = std::fs::remove_dir(&shown);
    let _ = std::fs::remove_dir_all(&shown);
    std::fs::rename(&hidden, &shown).unwrap();
    eventually("the store is found", || (status(&daemon, &path) == 200).then_some(()));
}

#[test]
fn a_killed_process_is_replaced_and_the_next_answer_is_right() {
    let store = Store::new();
    let paths: Vec<String> = (0..5).map(|i| store.add_text(&format!("text-{i}"), "text")).collect();
    let daemon = Daemon::serve(store.root(), "");
    for (round, path) in paths.iter().enumerate() {
        assert_eq!(status(&daemon, path), 200);
        let [child] = daemon.children()[..] else { panic!("{:?}", daemon.children()) };
        signal(child, "-KILL");
        // What is remembered has lost its lease with the process: it is asked about anew.
        eventually("the death is noticed", || {
            (daemon.logged("nix-store died and is started again").len() > round).then_some(())
        });
        eventually("it answers again", || (status(&daemon, path) == 200).then_some(()));
    }
    assert_eq!(daemon.metric("peernix_store_child_restarts_total"), 5.0);
}

#[test]
fn a_process_that_does_not_answer_is_a_fast_404_and_gets_replaced() {
    let store = Store::new();
    let path = store.add_text("text", "text");
    let daemon = Daemon::serve(store.root(), "query_timeout = \"200ms\"");
    eventually("it serves", || get(&daemon.url("health")).text().contains("serving").then_some(()));
    signal(daemon.children()[0], "-STOP");
    assert_eq!(status(&daemon, &path), 404);
    eventually("another process answers", || (status(&daemon, &path) == 200).then_some(()));
}

#[test]
fn a_process_that_does_not_answer_keeps_its_leases() {
    let store = Store::new();
    let (leased, other) = (store.add_text("leased", "text"), store.add_text("other", "text"));
    let daemon = Daemon::serve(store.root(), "query_timeout = \"300ms\"\nlease = \"1h\"");
    assert_eq!(status(&daemon, &leased), 200);
    let stuck = daemon.children()[0];
    signal(stuck, "-STOP");
    // Not within the time that a request waits: on loopback that is a 404, soon, unless it was noticed before.
    assert!([200, 404].contains(&status(&daemon, &other)));
    eventually("another process answers", || (status(&daemon, &other) == 200).then_some(()));
    assert!(daemon.children().contains(&stuck), "it was ended, and with it its leases");
    signal(stuck, "-CONT");
    assert!(
        !run(store.nix("nix-store").args(["--delete", &leased])).status.success(),
        "a leased path was deleted"
    );
}

#[test]
fn a_path_that_is_not_understood_is_not_here_and_harms_no_other() {
    let store = Store::new();
    let good = store.add_text("good", "text");
    // Nix 2.8 takes a reference whose name begins with dots; newer ones, and we, do not.
    let (odd, poisoned) =
        (format!("/nix/store/{}-..-x", "0".repeat(32)), format!("/nix/store/{}-poisoned", "1".repeat(32)));
    let empty = |path: &str, references: Vec<String>| (path.to_owned(), b"x".to_vec(), references);
    store.register_files(&[empty(&odd, Vec::new()), empty(&poisoned, vec![odd.clone()])]);
    let daemon = Daemon::serve(store.root(), "");
    assert_eq!(status(&daemon, &good), 200);
    for _ in 0..3 {
        assert_eq!(status(&daemon, &poisoned), 404);
    }
    assert_eq!(daemon.metric("peernix_store_child_restarts_total"), 0.0);
    assert_eq!(status(&daemon, &good), 200);
    assert!(!run(store.nix("nix-store").args(["--delete", &good])).status.success(), "its lease was lost");
}

#[test]
fn a_successor_that_does_not_start_holds_nobody_up() {
    let store = Store::new();
    let paths: Vec<String> = (0..20).map(|i| store.add_text(&format!("text-{i}"), "text")).collect();
    // The first process is Nix itself; whatever is started later hangs.
    let script = store.root().join("nix-store-once");
    let started = store.root().join("started");
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *--serve*) mkdir {started:?} 2>/dev/null || exec sleep 1000 ;; esac\nexec nix-store \"$@\"\n"
    );
    std::fs::write(&script, text).unwrap();
    succeed(std::process::Command::new("chmod").arg("+x").arg(&script));
    let daemon = Daemon::serve(store.root(), &format!("nix_store = {script:?}\nlease = \"1s\""));
    let began = Instant::now();
    let mut asked = 0;
    while began.elapsed() < Duration::from_secs(3) {
        assert_eq!(status(&daemon, &paths[asked % paths.len()]), 200);
        asked += 1;
    }
    assert!(asked > 20, "{asked} answers in three seconds");
}

#[test]
fn leases_hold_against_deletion_and_end_after_their_time() {
    let store = Store::new();
    let path = store.add_text("text", "text");
    let daemon = Daemon::serve(store.root(), "lease = \"2s\"");
    let delete = || run(store.nix("nix-store").args(["--delete", &path])).status.success();
    assert_eq!(status(&daemon, &path), 200);
    assert!(!delete(), "a leased path was deleted");
    assert!(daemon.metric("peernix_store_leases") >= 1.0);
    // Asked for again and again, it stays leased across the change of processes.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        assert_eq!(status(&daemon, &path), 200);
        assert!(!delete(), "a leased path was deleted after {:?}", began.elapsed());
    }
    eventually("the lease ends", || delete().then_some(()));
    assert_eq!(status(&daemon, &path), 404);
    eventually("no lease is left", || (daemon.metric("peernix_store_leases") == 0.0).then_some(()));
    eventually("one process is left", || (daemon.children().len() == 1).then_some(()));
}

#[test]
fn what_is_not_valid_is_not_kept_for_longer_than_a_lease_either() {
    let store = Store::new();
    let path = format!("/nix/store/{}-half", "0".repeat(32));
    std::fs::write(store.real(&path), "half built").unwrap();
    let daemon = Daemon::serve(store.root(), "lease = \"2s\"");
    assert_eq!(status(&daemon, &path), 404);
    let is_kept = || text(store.nix("nix-store").args(["--gc", "--print-roots"])).contains(&path);
    assert!(is_kept(), "nix-store takes a root of whatever it is asked about");
    assert_eq!(daemon.metric("peernix_store_leases"), 0.0);
    eventually("the root goes", || (!is_kept()).then_some(()));
}

#[test]
fn lost_events_lead_to_a_scan() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "");
    eventually("the first scan", || (daemon.metric("peernix_store_scans_total") >= 1.0).then_some(()));
    // The daemon stands still while more names come and go than the kernel keeps events for.
    signal(daemon.pid(), "-STOP");
    for i in 0..20_000 {
        let name = store.directory().join(format!("noise-{i}"));
        std::fs::write(&name, "").unwrap();
        std::fs::remove_file(&name).unwrap();
    }
    let path = store.add_text("text", "text");
    signal(daemon.pid(), "-CONT");
    assert_eq!(status(&daemon, &path), 200);
    assert!(daemon.metric("peernix_store_scans_total") >= 2.0);
}

#[test]
fn a_hundred_questions_at_once_are_answered() {
    let store = Store::new();
    let paths: Vec<String> = (0..100).map(|i| format!("/nix/store/{:0>32}-text", i.to_string())).collect();
    let files: Vec<_> = paths.iter().map(|path| (path.clone(), b"text".to_vec(), Vec::new())).collect();
    store.register_files(&files);
    let daemon = Daemon::serve(store.root(), "");
    std::thread::scope(|scope| {
        for path in &paths {
            scope.spawn(|| assert_eq!(status(&daemon, path), 200));
        }
    });
    assert_eq!(daemon.metric("peernix_store_queries_total"), 100.0);
    assert_eq!(daemon.children().len(), 1);
}
