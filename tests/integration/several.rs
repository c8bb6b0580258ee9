//! One NAR from several peers at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::narinfo::{field, hash_part};
use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::http::get;
use crate::support::lan::{self, Lan, metric};
use crate::support::scripted::{Honest, Script, Scripted, Then, ask, honest, relaying};
use crate::support::store::Store;
use crate::support::{eventually, succeed, text};

/// Large enough to come from several at once.
const LARGE: usize = 34 << 20;
const PIECES: &str = "peernix_relay_pieces_total";
const REASSIGNED: &str = "peernix_relay_pieces_reassigned_total";
const LIES: &str = "peernix_peer_lies_total";
const SETTINGS: &str = "[resolve]\nnarinfo_budget = \"5s\"\nstall = \"2s\"";

/// A peer that says what the honest one says, but for the NAR: the script of that is made anew for each request, told how many there
/// were before.
fn peer(honest: &Honest, nar: impl Fn(usize, Vec<u8>) -> Script + Send + Sync + 'static) -> Scripted {
    peer_with(honest, honest.nar.clone(), nar)
}

/// The same with other bytes.
fn peer_with(
    honest: &Honest,
    whole: Vec<u8>,
    nar: impl Fn(usize, Vec<u8>) -> Script + Send + Sync + 'static,
) -> Scripted {
    let (upstream, asked) = (honest.daemon.url("nix-cache"), AtomicUsize::new(0));
    Scripted::start(move |path| {
        if path.ends_with(".nar") {
            return nar(asked.fetch_add(1, Ordering::SeqCst), whole.clone());
        }
        let truth = get(&format!("{upstream}/{path}"));
        Script { status: truth.status, ..Script::ok(truth.bytes()) }
    })
}

/// Gives parts, as fast as it may be asked to.
fn parts(nar: Vec<u8>) -> Script {
    Script { ranges: true, ..Script::ok(nar) }
}

/// Each piece takes a while, so that others are needed and have their turns.
fn slow_parts(nar: Vec<u8>) -> Script {
    std::thread::sleep(Duration::from_millis(60));
    parts(nar)
}

/// Sends no more than the beginning of a piece.
fn breaks_off(nar: Vec<u8>, then: Then) -> Script {
    Script { cut: Some(100_000), then, ..parts(nar) }
}

fn fetched(honest: &Honest, daemon: &Daemon) -> std::io::Result<Vec<u8>> {
    assert_eq!(ask(daemon, &honest.path).status, 200);
    get(&daemon.url(&honest.nar_url)).try_bytes()
}

#[test]
fn two_hosts_that_have_it_send_a_part_each() {
    let lan = Lan::new();
    let hosts = [lan.host(1, ""), lan.host(2, ""), lan.host(3, "")];
    let contents: Vec<u8> = (0..LARGE).map(|at| (at * 31 % 251) as u8).collect();
    let paths = [&hosts[0], &hosts[1]].map(|host| {
        // Faster ones need no help.
        succeed(
            host.command("tc")
                .args("qdisc add dev eth0 root tbf rate 300mbit burst 64k latency 50ms".split(' ')),
        );
        std::fs::write(host.nix_folder().join("home/payload"), &contents).unwrap();
        text(host.command("nix-store").args(["--add", "/nix/home/payload"]))
    });
    assert_eq!(paths[0], paths[1]);
    let settings = format!("[discovery]\nmdns = false\n{SETTINGS}");
    let _daemons = hosts.each_ref().map(|host| Daemon::start_as_configured(host.command(PROGRAM), &settings));
    eventually("the peers are known", || (metric(&hosts[2], "peernix_peers") == 2.0).then_some(()));
    let narinfo = format!("nix-cache/{}.narinfo", hash_part(&paths[0]));
    let told = eventually("it is found", || {
        let (status, told) = lan::ask(&hosts[2], &narinfo);
        (status == 200).then_some(told)
    });
    let url = format!("http://127.0.0.1:9999/{}", field(&told, "URL").unwrap());
    succeed(hosts[2].command("curl").args([
        "--silent",
        "--fail",
        "--max-time",
        "60",
        "--output",
        "/nix/home/nar",
        &url,
    ]));
    let nar = std::fs::read(hosts[2].nix_folder().join("home/nar")).unwrap();
    let dumped = succeed(hosts[0].command("nix-store").args(["--dump", &paths[0]]));
    assert!(nar == dumped);
    let sent = [0, 1].map(|host| metric(&hosts[host], "peernix_http_response_bytes_total{route=\"nar\"}"));
    assert!(sent.iter().all(|bytes| *bytes > 0.0), "{sent:?}");
    assert_eq!(metric(&hosts[2], "peernix_relayed_bytes_total"), nar.len() as f64);
    assert!(metric(&hosts[2], PIECES) > 3.0);
    assert_eq!(metric(&hosts[2], "peernix_relay_failovers_total"), 0.0);
}

#[test]
fn who_dies_or_stalls_midway_is_left_out_and_its_pieces_come_from_another() {
    let honest = honest(LARGE);
    let dies: fn(Vec<u8>) -> Script = |nar| breaks_off(nar, Then::Closes);
    let stalls: fn(Vec<u8>) -> Script = |nar| breaks_off(nar, Then::Hangs);
    for fails in [dies, stalls] {
        let wrong = peer(&honest, move |asked, nar| if asked >= 2 { fails(nar) } else { slow_parts(nar) });
        let right = peer(&honest, |_, nar| slow_parts(nar));
        let (_store, daemon) = relaying(&honest.key, &[wrong.url(), right.url()], SETTINGS);
        assert!(fetched(&honest, &daemon).unwrap() == honest.nar);
        assert!(daemon.metric(REASSIGNED) >= 1.0);
        assert!(wrong.asked_for(".nar") >= 3 && right.asked_for(".nar") >= 3);
        assert_eq!(daemon.metric(LIES), 0.0);
    }
}

#[test]
fn a_peer_without_ranges_sends_all_or_nothing() {
    let honest = honest(LARGE);
    for both in [true, false] {
        let whole = peer(&honest, |_, nar| Script::ok(nar));
        let other = peer(&honest, move |_, nar| if both { Script::ok(nar) } else { slow_parts(nar) });
        let (_store, daemon) = relaying(&honest.key, &[whole.url(), other.url()], SETTINGS);
        assert!(fetched(&honest, &daemon).unwrap() == honest.nar);
        assert_eq!(daemon.metric(LIES) + daemon.metric("peernix_relay_failovers_total"), 0.0);
    }
}

/// Two peers send, one of them wrongly at these places: what the client gets is never wrong, and it gets it in the end. Gives how often
/// it was cut off before.
fn comes_right(honest: &Honest, wrong_at: impl Iterator<Item = usize>) -> usize {
    let mut bytes = honest.nar.clone();
    wrong_at.for_each(|at| bytes[at] ^= 1);
    let wrong = peer_with(honest, bytes, |_, nar| slow_parts(nar));
    let right = peer(honest, |_, nar| slow_parts(nar));
    let (_store, daemon) = relaying(&honest.key, &[wrong.url(), right.url()], SETTINGS);
    let mut cut = 0;
    eventually("the right one is found", || {
        if ask(&daemon, &honest.path).status != 200 {
            return None;
        }
        let Ok(bytes) = get(&daemon.url(&honest.nar_url)).try_bytes() else {
            cut += 1;
            return None;
        };
        assert!(bytes == honest.nar, "other bytes are passed on as good");
        Some(())
    });
    // Whoever is right is not left out for what the other did.
    let told = daemon.logged("a peer said what is not so");
    assert!(told.len() <= 1, "{told:?}");
    cut
}

#[test]
fn what_proves_wrong_comes_from_each_alone_and_is_never_passed_on_as_good() {
    let honest = honest(LARGE);
    let len = honest.nar.len();
    // Given out already when it is known.
    let cut = comes_right(&honest, (7..len).step_by(64 << 10));
    assert!(cut <= 2, "cut {cut} times");
    // At the end, which is held back: nobody sees it.
    assert_eq!(comes_right(&honest, std::iter::once(len - 20)), 0);
}

#[test]
fn small_nars_come_now_from_one_and_now_from_the_other() {
    let stores = [Store::new(), Store::new()];
    let paths: Vec<String> = (0..24)
        .map(|number| {
            let added = stores.each_ref().map(|store| store.add_text("text", &format!("text {number}")));
            assert_eq!(added[0], added[1]);
            added[0].clone()
        })
        .collect();
    let holders = stores.each_ref().map(|store| Daemon::serve(store.root(), ""));
    let key = crate::signatures::nix_key(&Store::new(), "stranger-1").1;
    let (_store, daemon) = relaying(&key, &holders.each_ref().map(Daemon::substituter), SETTINGS);
    for path in &paths {
        let url = field(&ask(&daemon, path).text(), "URL").unwrap();
        assert_eq!(get(&daemon.url(&url)).status, 200);
    }
    let sent =
        holders.each_ref().map(|holder| holder.metric("peernix_http_response_bytes_total{route=\"nar\"}"));
    assert!(sent.iter().all(|bytes| *bytes > 0.0), "{sent:?}");
}
