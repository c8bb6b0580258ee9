//! SIGTERM: answers in flight come to their end, within a deadline, and nothing is left running.

use std::io::Read as _;
use std::net::TcpStream;
use std::path::Path;

use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::http::get;
use crate::support::store::{Registration, Store};

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
