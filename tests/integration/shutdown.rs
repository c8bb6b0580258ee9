//! SIGTERM: answers in flight come to their end, within a deadline, and nothing is left running.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::narinfo::hash_part;
use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::http::get;
use crate::support::store::{Registration, Store};
use crate::support::{eventually, succeed};

const PART: &str = "00000000000000000000000000000000";

fn large_store() -> Store {
    let store = Store::new();
    let path = format!("/nix/store/{PART}-large");
    std::fs::write(store.real(&path), vec![1; 64 << 20]).unwrap();
    store.register(&[Registration { path: &path, deriver: "", references: &[] }]);
    store
}

#[test]
fn a_nar_in_flight_comes_to_its_end() {
    let store = large_store();
    let mut daemon = Daemon::serve(store.root(), "");
    let mut body = get(&daemon.url(&format!("{PART}.nar"))).reader();
    let mut first = [0; 1000];
    body.read_exact(&mut first).unwrap();
    let children = daemon.children();
    daemon.signal("-TERM");
    eventually("it stops accepting", || TcpStream::connect(daemon.address).is_err().then_some(()));
    let mut rest = Vec::new();
    body.read_to_end(&mut rest).unwrap();
    assert!(first.len() + rest.len() > 64 << 20);
    assert!(daemon.wait().success());
    eventually("it says so", || (daemon.logged("stopped").len() == 1).then_some(()));
    for child in children {
        assert!(!Path::new(&format!("/proc/{child}")).exists(), "nix-store was left running");
    }
}

#[test]
fn a_client_that_does_not_read_holds_it_up_no_longer_than_the_deadline() {
    let store = large_store();
    let mut daemon = Daemon::serve(store.root(), "[http]\ndrain_time = \"300ms\"");
    let _stuck = get(&daemon.url(&format!("{PART}.nar")));
    daemon.signal("-TERM");
    assert!(daemon.wait().success());
    assert_eq!(daemon.logged("answers were cut: http.drain_time is over").len(), 1);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let store = large_store();
    let mut daemon = Daemon::serve(store.root(), "[http]\ndrain_time = \"1h\"");
    let _stuck = get(&daemon.url(&format!("{PART}.nar")));
    daemon.signal("-INT");
    let stopping = "stopping; answers in flight may come to their end, a second signal ends them";
    eventually("it begins to stop", || (daemon.logged(stopping).len() == 1).then_some(()));
    // One that comes within moments of the first is taken for the same.
    let ended = eventually("a second signal ends it", || {
        daemon.signal("-TERM");
        daemon.ended()
    });
    assert_eq!(ended.code(), Some(1));
}

#[test]
fn two_signals_within_moments_are_one() {
    let store = large_store();
    let mut daemon = Daemon::serve(store.root(), "[http]\ndrain_time = \"300ms\"");
    let _stuck = get(&daemon.url(&format!("{PART}.nar")));
    // Both wait for it when it goes on, however busy the machine is.
    for signal in ["-STOP", "-TERM", "-INT", "-CONT"] {
        daemon.signal(signal);
    }
    assert!(daemon.wait().success());
    assert_eq!(daemon.logged("answers were cut: http.drain_time is over").len(), 1);
}

#[test]
fn idle_connections_do_not_hold_it_up() {
    let store = Store::new();
    let mut daemon = Daemon::serve(store.root(), "[http]\ndrain_time = \"1h\"");
    let idle = TcpStream::connect(daemon.address).unwrap();
    daemon.signal("-TERM");
    assert!(daemon.wait().success());
    drop(idle);
}

#[test]
fn a_daemon_whose_log_nobody_reads_any_more_goes_on() {
    let store = Store::new();
    let path = store.add_text("text", "text");
    let config = store.root().join("peernix.toml");
    let (root, state) = (store.root(), store.root().join("state"));
    let settings = format!(
        "[store]\nroot = {root:?}\n[state]\ndirectory = {state:?}\n[discovery]\nenable = false\n[log]\nformat = \"json\"\n"
    );
    std::fs::write(&config, settings).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["--listen", "127.0.0.1:0", "--config"]).arg(&config).env_remove("PEERNIX_LOG");
    let mut daemon = command.stderr(Stdio::piped()).spawn().unwrap();
    let log = BufReader::new(daemon.stderr.take().unwrap());
    let mut lines = log.lines().map_while(Result::ok);
    let line = lines.find(|line| line.contains("\"listening\"")).expect("it listens");
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    let url = format!("http://{}/{}.narinfo", line["address"].as_str().unwrap(), hash_part(&path));
    // As when a terminal is closed.
    drop(lines);
    for _ in 0..3 {
        succeed(Command::new("kill").args(["-HUP", &daemon.id().to_string()]));
        eventually("it answers", || (get(&url).status == 200).then_some(()));
        assert!(daemon.try_wait().unwrap().is_none());
    }
    succeed(Command::new("kill").arg(daemon.id().to_string()));
    assert!(daemon.wait().unwrap().success());
}
