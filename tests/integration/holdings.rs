//! What peers tell of what they hold: who need not be asked, and what is found all the same.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::eventually;
use crate::support::http::{get, get_with};
use crate::support::scripted::{ask, honest, relaying};
use crate::support::store::Store;

fn asked(daemon: &Daemon) -> f64 {
    daemon.metric("peernix_peer_requests_total{outcome=\"ok\"}")
}

fn miss(daemon: &Daemon, number: usize) {
    assert_eq!(ask(daemon, &format!("/nix/store/{number:0>32}-x")).status, 404);
}

fn knows(daemon: &Daemon, count: f64) {
    eventually("it is known what the peers hold", || {
        (daemon.metric("peernix_holdings_known") == count).then_some(())
    });
}

#[test]
fn a_miss_asks_nobody_and_a_gained_path_is_found() {
    let (one, two) = (honest(1000), Store::new());
    // What two will have, to know its name.
    let path = Store::new().add_text("gained", "gained\n");
    let other = Daemon::serve(two.root(), "");
    let (_store, daemon) = relaying(&one.key, &[one.daemon.substituter(), other.substituter()], "");
    // That they are peernix is known from their first answers.
    miss(&daemon, 0);
    assert_eq!(asked(&daemon), 2.0);
    knows(&daemon, 2.0);
    assert_eq!(ask(&daemon, &path).status, 404);
    for number in 1..20 {
        miss(&daemon, number);
    }
    assert_eq!(asked(&daemon), 2.0);
    assert_eq!(daemon.metric("peernix_peer_requests_spared_total"), 40.0);
    assert_eq!(ask(&daemon, &one.path).status, 200);
    assert_eq!(asked(&daemon), 3.0, "only who has it was asked");

    assert_eq!(two.add_text("gained", "gained\n"), path);
    let began = Instant::now();
    eventually("the gained path is found", || (ask(&daemon, &path).status == 200).then_some(()));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());

    // Who does not answer for its set any more is asked again, as anybody.
    drop(other);
    knows(&daemon, 1.0);
}

#[test]
fn paths_that_come_one_after_the_other_are_found_each() {
    let (names, holder) = (Store::new(), Store::new());
    let texts: Vec<String> = (0..25).map(|number| format!("text-{number}")).collect();
    let paths: Vec<String> = texts.iter().map(|text| names.add_text(text, text)).collect();
    let peer = Daemon::serve(holder.root(), "");
    let key = get(&peer.url("public-key")).text();
    let (_store, daemon) = relaying(key.trim(), &[peer.substituter()], "");
    miss(&daemon, 0);
    for (text, path) in texts.iter().zip(&paths) {
        // Around the first set and every difference, whether the miss is remembered or not.
        ask(&daemon, path);
        holder.add_text(text, text);
        let began = Instant::now();
        eventually("it is found", || (ask(&daemon, path).status == 200).then_some(()));
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
}

#[test]
fn who_does_not_tell_is_asked_for_every_path() {
    let (store, silent) = (Store::new(), Store::new());
    let silent = Daemon::serve(silent.root(), "[share]\nholdings = false");
    assert_eq!(get(&silent.url("api/v1/holdings")).status, 404);
    let settings = format!("[[peer]]\nurl = {:?}\n", silent.substituter());
    let daemon = Daemon::serve(store.root(), &settings);
    for number in 0..30 {
        miss(&daemon, number);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(asked(&daemon), 30.0);
    assert_eq!(daemon.metric("peernix_holdings_known"), 0.0);
}

#[test]
fn whoever_waits_for_gains_does_not_hold_up_the_end() {
    let store = Store::new();
    let mut daemon = Daemon::start(Command::new(PROGRAM), &format!("[store]\nroot = {:?}", store.root()));
    let whole = get_with(&daemon.url("nix-cache/api/v1/holdings"), &[("x-peernix-peer", "somebody")]);
    assert_eq!(whole.status, 200);
    let instance = whole.header("x-peernix-instance").unwrap().to_owned();
    let whole = whole.bytes();
    assert!(whole.starts_with(b"peernix-holdings-2\n"));
    let number = u64::from_le_bytes(whole[27..35].try_into().unwrap());
    // Of another run, or from the future: the whole again, at once.
    for known in [format!("{:016x}-{number}", 1), format!("{instance}-{}", number + 1), "x".to_owned()] {
        assert_eq!(get(&daemon.url(&format!("api/v1/holdings?since={known}"))).bytes(), whole);
    }
    let url = daemon.url(&format!("api/v1/holdings?since={instance}-{number}"));
    let waiting = std::thread::spawn(move || get(&url).status);
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished());
    let began = Instant::now();
    daemon.signal("-TERM");
    assert!(daemon.wait().success());
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(waiting.join().unwrap(), 304);
}
