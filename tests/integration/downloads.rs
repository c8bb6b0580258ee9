//! NARs of peers on their way: a peer that fails midway is replaced, and what many ask for comes once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::narinfo::field;
use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::http::{get, head};
use crate::support::scripted::{Honest, Script, Scripted, Then, ask, honest, relaying};
use crate::support::store::Store;

/// Large enough to be streamed and not verified first.
const LARGE: usize = 20 << 20;

/// A peer that says what the honest one says, but for the NAR, and says it sooner or later.
fn peer(honest: &Honest, later: bool, nar: impl Fn(Vec<u8>) -> Script + Send + Sync + 'static) -> Scripted {
    let upstream = honest.daemon.url("nix-cache");
    Scripted::start(move |path| {
        let truth = get(&format!("{upstream}/{path}"));
        if path.ends_with(".nar") {
            return nar(truth.bytes());
        }
        if later && path.ends_with(".narinfo") {
            // The other one is asked first then.
            std::thread::sleep(Duration::from_millis(400));
        }
        Script { status: truth.status, ..Script::ok(truth.bytes()) }
    })
}

fn half(nar: Vec<u8>, then: Then) -> Script {
    Script { length: Some(nar.len()), then, ..Script::ok(nar[..nar.len() / 2].to_vec()) }
}

/// The first peer that is asked fails in this way; the second is good, with ranges or without.
fn is_replaced(honest: &Honest, fails: fn(Vec<u8>) -> Script, ranges: bool) {
    let first = peer(honest, false, fails);
    let second = peer(honest, true, move |nar| Script { ranges, ..Script::ok(nar) });
    let settings = "[resolve]\nnarinfo_budget = \"5s\"\nstall = \"2s\"";
    let (_store, daemon) = relaying(&honest.key, &[first.url(), second.url()], settings);
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar, "ranges: {ranges}");
    assert_eq!((first.asked_for(".nar"), second.asked_for(".nar")), (1, 1));
    assert_eq!(daemon.metric("peernix_relay_failovers_total"), 1.0);
}

#[test]
fn a_peer_that_dies_stalls_or_drips_midway_is_replaced_at_the_same_offset() {
    let honest = honest(LARGE);
    for ranges in [true, false] {
        is_replaced(&honest, |nar| half(nar, Then::Closes), ranges);
        is_replaced(&honest, |nar| half(nar, Then::Hangs), ranges);
        // The bytes are right, as far as they come.
        let drips: fn(Vec<u8>) -> Script = |nar| {
            let rest = nar[nar.len() / 2..].to_vec();
            half(nar, Then::Drips(rest))
        };
        is_replaced(&honest, drips, ranges);
    }
}

#[test]
fn bytes_that_prove_wrong_before_they_were_given_out_come_from_another_peer() {
    let honest = honest(LARGE);
    let lie: fn(Vec<u8>) -> Script = |mut nar| {
        let at = nar.len() - 20;
        nar[at] ^= 1;
        Script::ok(nar)
    };
    is_replaced(&honest, lie, true);
    is_replaced(&honest, lie, false);
}

#[test]
fn who_lies_and_breaks_off_each_time_makes_no_liar_of_who_goes_on() {
    // All of it is verified before any is given out.
    let honest = honest(1 << 20);
    let liar = peer(&honest, false, |mut nar| {
        nar[1000] ^= 1;
        half(nar, Then::Closes)
    });
    let good = peer(&honest, true, |nar| Script { ranges: true, ..Script::ok(nar) });
    let settings = "[resolve]\nnarinfo_budget = \"5s\"";
    let (_store, daemon) = relaying(&honest.key, &[liar.url(), good.url()], settings);
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar);
    let of_the_good_one = format!("{}/", good.address);
    let blamed = |line: &String| line.contains("is not so") && line.contains(&of_the_good_one);
    assert!(!daemon.log().iter().any(blamed), "{:?}", daemon.log());
}

#[test]
fn bytes_that_prove_wrong_after_they_were_given_out_are_cut_and_never_mended_unseen() {
    let honest = honest(LARGE);
    let first = peer(&honest, false, |mut nar| {
        nar[1000] ^= 1;
        Script::ok(nar)
    });
    let second = peer(&honest, true, Script::ok);
    let settings = "[resolve]\nnarinfo_budget = \"5s\"";
    let (_store, daemon) = relaying(&honest.key, &[first.url(), second.url()], settings);
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    assert!(get(&daemon.url(&honest.nar_url)).try_bytes().is_err());
    // Whoever asks again gets it.
    assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar);
}

#[test]
fn what_many_ask_for_at_once_comes_once_or_twice_and_whole_to_each() {
    let honest = honest(LARGE);
    let (_store, daemon) = {
        let peer = peer(&honest, false, Script::ok);
        let (store, daemon) = relaying(&honest.key, &[peer.url()], "");
        assert_eq!(ask(&daemon, &honest.path).status, 200);
        let good = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar);
                    good.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        assert_eq!(good.into_inner(), 16);
        assert!(peer.asked_for(".nar") <= 2, "{}", peer.asked_for(".nar"));
        (store, daemon)
    };
    // Nobody reads any more: no file is left open.
    let files = || {
        std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
            .unwrap()
            .flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .filter(|target| target.to_string_lossy().contains("(deleted)"))
            .count()
    };
    assert!(files() <= 1, "one complete spool may stay for whoever asks next");
}

#[test]
fn a_head_fetches_nothing_and_small_nars_come_before_they_are_asked_for() {
    let honest = honest(1000);
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let peer = peer(&honest, false, move |nar| {
        counted.fetch_add(1, Ordering::SeqCst);
        Script::ok(nar)
    });
    let (_store, daemon) = relaying(&honest.key, &[peer.url()], "");
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    let told = head(&daemon.url(&honest.nar_url));
    assert_eq!(told.header("content-length"), Some(&*honest.nar.len().to_string()));
    assert_eq!(asked.load(Ordering::SeqCst), 0);

    // A second path of the same holder: its NAR comes while the first is read.
    let text = honest.store.add_text("another", "text");
    assert_eq!(ask(&daemon, &text).status, 200);
    assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar);
    eventually("the other one was prepared", || (asked.load(Ordering::SeqCst) == 2).then_some(()));
    assert_eq!(daemon.metric("peernix_relays_prepared_total"), 1.0);
}

#[test]
fn a_peer_that_has_narinfos_and_no_nars_is_asked_less_and_less() {
    let honest = honest(1000);
    let missing: fn(Vec<u8>) -> Script = |_| Script { status: 404, ..Script::ok(Vec::new()) };
    let broken: fn(Vec<u8>) -> Script = |nar| half(nar, Then::Closes);
    for nar in [missing, broken] {
        let peer = peer(&honest, false, nar);
        let (_store, daemon) = relaying(&honest.key, &[peer.url()], "");
        let pauses = eventually("its pauses add up, though it answers well in between", || {
            if ask(&daemon, &honest.path).status == 200 {
                assert_eq!(get(&daemon.url(&honest.nar_url)).status, 404);
            }
            let told = daemon.logged("a peer failed and is not asked for a while");
            let pauses: Vec<u64> = told.iter().filter_map(|line| line["pause_ms"].as_u64()).collect();
            (pauses.len() >= 3).then_some(pauses)
        });
        assert_eq!(pauses[..3], [500, 1000, 2000]);
    }
}

#[test]
fn a_peer_that_sends_each_byte_by_itself_takes_no_more_memory_than_its_bytes() {
    let honest = honest(1 << 20);
    let peer = peer(&honest, false, |nar| Script { byte_chunks: true, ..Script::ok(nar) });
    // Hashed and held together first; each by itself they would take some 50 bytes a byte.
    for verify_first in ["4MiB", "0B"] {
        let settings = format!("[resolve]\nverify_first = {verify_first:?}\nstall = \"60s\"");
        let (_store, daemon) = relaying(&honest.key, &[peer.url()], &settings);
        assert_eq!(ask(&daemon, &honest.path).status, 200);
        let most_memory = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
        };
        let before = most_memory();
        assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar);
        let more = most_memory() - before;
        assert!(more < 24 << 20, "{more} bytes for a NAR of {}", honest.nar.len());
    }
}

#[test]
fn who_tells_a_wrong_nar_size_makes_no_liar_of_who_tells_the_right_one() {
    let source = Store::new();
    let text = source.add_text("text", "content-addressed: that proves no NarSize");
    let honest = Daemon::serve(source.root(), "");
    let start = |is_right: bool| {
        let upstream = honest.url("nix-cache");
        Scripted::start(move |path| {
            let truth = get(&format!("{upstream}/{path}"));
            if is_right {
                // The other one is asked first then.
                std::thread::sleep(Duration::from_millis(400));
                return Script { status: truth.status, ..Script::ok(truth.bytes()) };
            }
            if path.ends_with(".nar") {
                return Script { status: 404, ..Script::ok(Vec::new()) };
            }
            let told = String::from_utf8(truth.bytes()).unwrap();
            let size = field(&told, "NarSize").unwrap();
            Script::ok(told.replace(&format!("Size: {size}\n"), "Size: 4096\n").into_bytes())
        })
    };
    let (wrong, right) = (start(false), start(true));
    let key = crate::signatures::nix_key(&Store::new(), "stranger-1").1;
    let settings = "[resolve]\nnarinfo_budget = \"5s\"";
    let (_store, daemon) = relaying(&key, &[wrong.url(), right.url()], settings);
    let told = ask(&daemon, &text).text();
    assert_eq!(field(&told, "NarSize").as_deref(), Some("4096"));
    let url = daemon.url(&field(&told, "URL").unwrap());
    assert_eq!(get(&url).status, 404);
    assert_eq!(right.asked_for(".nar"), 0, "it has no NAR of this length");
    assert_eq!(daemon.metric("peernix_peer_lies_total"), 0.0);
    // Once it is known who is right, it comes.
    eventually("the right one is told", || {
        let told = ask(&daemon, &text);
        let is_right = told.status == 200 && field(&told.text(), "NarSize").as_deref() != Some("4096");
        // Or the wrong one is paused once more.
        (is_right || get(&url).status == 200).then_some(())
    });
    assert_eq!(get(&url).status, 200);
    assert_eq!(daemon.metric("peernix_peer_lies_total"), 0.0);
}
