//! Real collections of garbage against a running daemon: what is leased outlives them, and what is gone comes from a peer
//! or is a 404, never bytes that end early as if they were complete.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};

use peernix::nix::NarHash;
use sha2::{Digest as _, Sha256};

use crate::narinfo::{field, hash_part, narinfo};
use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::host::Host;
use crate::support::http::{Answer, get};
use crate::support::lan::{Lan, ask, key, metric, signal};
use crate::support::{eventually, run, succeed, text};

/// One file of 24 MiB: more than the sockets between a client and the daemon take.
const LARGE: &str = r#"derivation {
  name = "large"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" ''
    block=collected-or-not; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do block=$block$block; done
    i=0; while [ $i -lt 96 ]; do printf %s "$block"; i=$((i+1)); done > $out
  '' ]; }"#;

/// Thousands of small files, 14 MB: long to collect, and more than the sockets between a client and the daemon take.
const MANY: &str = r#"derivation {
  name = "many"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  args = [ "-c" "mkdir -p $out/below; cd $out/below; seq -f %01500.0f 8000 | split --lines 1 --suffix-length 6" ]; }"#;

/// Another content each time that it is built.
const DICE: &str = r#"derivation {
  name = "dice"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  args = [ "-c" "cat /proc/sys/kernel/random/uuid > $out" ]; }"#;

/// The command line of a process that holds leases.
const SERVES: &str = "^nix-store .*--serve";

const SOON: &str = "[store]\nlease = \"1s\"\n";

/// Who collects, and who serves.
#[derive(Clone, Copy, PartialEq)]
enum As {
    Root,
    /// Both through nix-daemon.
    Nobody,
}

struct Collected {
    host: Host,
    path: String,
    daemon: Daemon,
    who: As,
}

impl Collected {
    /// A host that has built a path, and its daemon.
    fn new(who: As, expression: &str, settings: &str) -> Self {
        let mut host = Host::new("");
        let path = host.build(expression).remove(0);
        let program = host.install(PROGRAM);
        let command = match who {
            As::Root => host.command(program),
            As::Nobody => {
                host.start_nix_daemon();
                host.command_as_nobody(program)
            }
        };
        let daemon = Daemon::start(command, settings);
        Self { host, path, daemon, who }
    }

    fn nix(&self, line: &[&str]) -> Command {
        let mut command = match self.who {
            As::Root => self.host.command(line[0]),
            As::Nobody => self.host.command_as_nobody(line[0]),
        };
        command.args(&line[1..]);
        command
    }

    /// Every way in which Nix deletes a path.
    fn collectors(&self) -> Vec<Vec<&str>> {
        let delete = vec!["nix-store", "--delete", &self.path];
        let mut all = vec![vec!["nix-collect-garbage"], delete.clone()];
        // nix-daemon lets nobody ignore it: see below.
        if self.who == As::Root {
            all.push([delete, vec!["--ignore-liveness"]].concat());
        }
        all
    }

    fn is_there(&self) -> bool {
        let real = self.host.nix_folder().join(self.path.strip_prefix("/nix/").unwrap());
        real.symlink_metadata().is_ok()
    }

    fn narinfo(&self) -> Served {
        Served::of(&narinfo(&self.daemon, &self.path))
    }

    fn ask(&self, url: &str) -> Answer {
        get(&self.daemon.url(url))
    }

    /// Runs this collector until the path is gone: its lease has to end first.
    fn collect(&self, line: &[&str]) {
        eventually("the lease ends and the path is collected", || {
            run(&mut self.nix(line));
            (!self.is_there()).then_some(())
        });
    }
}

/// What a narinfo promises.
struct Served {
    url: String,
    nar_hash: String,
    nar_size: u64,
}

impl Served {
    fn of(narinfo: &str) -> Self {
        let field = |name| field(narinfo, name).unwrap();
        Self { url: field("URL"), nar_hash: field("NarHash"), nar_size: field("NarSize").parse().unwrap() }
    }

    fn is_kept_by(&self, nar: &[u8]) -> bool {
        let digest: [u8; 32] = Sha256::digest(nar).into();
        nar.len() as u64 == self.nar_size
            && self.nar_hash == format!("sha256:{}", NarHash::from_digest(digest).to_base32())
    }
}

fn outlives_all(who: As) {
    let collected = Collected::new(who, LARGE, "");
    for collector in collected.collectors() {
        // Between narinfo and NAR.
        let served = collected.narinfo();
        run(&mut collected.nix(&collector));
        assert!(served.is_kept_by(&collected.ask(&served.url).bytes()), "{collector:?}");
        // During the NAR.
        let mut nar = vec![0; 1 << 20];
        let mut rest = collected.ask(&served.url).reader();
        rest.read_exact(&mut nar).unwrap();
        run(&mut collected.nix(&collector));
        rest.read_to_end(&mut nar).unwrap();
        assert!(served.is_kept_by(&nar), "{collector:?}");
        assert!(collected.is_there());
    }
    assert_eq!(collected.daemon.metric("peernix_http_nar_cuts_total"), 0.0);
}

#[test]
fn what_is_leased_outlives_every_collection_by_root() {
    outlives_all(As::Root);
}

#[test]
fn what_is_leased_outlives_every_collection_through_nix_daemon() {
    outlives_all(As::Nobody);
}

#[test]
fn nix_daemon_lets_nobody_ignore_who_needs_a_path() {
    let collected = Collected::new(As::Nobody, LARGE, "");
    let served = collected.narinfo();
    let as_root = collected.host.command("nix-store");
    for mut delete in [as_root, collected.nix(&["nix-store"])] {
        delete.env("NIX_REMOTE", "daemon").args(["--delete", "--ignore-liveness", &collected.path]);
        let refused = run(&mut delete);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("not allowed to ignore liveness"), "{said}");
        assert!(served.is_kept_by(&collected.ask(&served.url).bytes()));
    }
}

#[test]
fn a_nar_in_flight_is_leased_however_long_it_takes() {
    let collected = Collected::new(As::Root, LARGE, SOON);
    let served = collected.narinfo();
    let mut nar = vec![0; 1 << 20];
    let mut rest = collected.ask(&served.url).reader();
    rest.read_exact(&mut nar).unwrap();
    // Another path's lease comes and goes meanwhile, so that processes change.
    eventually("another process takes the questions", || {
        let count = run(collected.host.command("pgrep").args(["-c", "-f", SERVES]));
        (count.stdout == b"2\n").then_some(())
    });
    let other = collected.host.build(DICE).remove(0);
    narinfo(&collected.daemon, &other);
    eventually("a later lease ends", || {
        run(&mut collected.nix(&["nix-store", "--delete", &other])).status.success().then_some(())
    });
    run(&mut collected.nix(&["nix-collect-garbage"]));
    rest.read_to_end(&mut nar).unwrap();
    assert!(served.is_kept_by(&nar));
    collected.collect(&["nix-collect-garbage"]);
}

fn comes_from_the_peer(who: As) {
    let peer = Host::new("");
    assert!(!peer.build(LARGE).is_empty());
    let upstream = Daemon::start(peer.command(PROGRAM), "");
    let trusted = get(&upstream.url("public-key")).text();
    let settings = format!(
        "{SOON}[trust]\npublic_keys = [{:?}]\nhost_keys = false\n[[peer]]\nurl = {:?}\n",
        trusted.trim(),
        upstream.substituter()
    );
    let collected = Collected::new(who, LARGE, &settings);
    for collector in collected.collectors() {
        assert_eq!(collected.host.build(LARGE)[0], collected.path);
        let served = eventually("it is served from here", || {
            let before = collected.daemon.metric("peernix_peer_requests_total{outcome=\"ok\"}");
            let served = collected.narinfo();
            let asked = collected.daemon.metric("peernix_peer_requests_total{outcome=\"ok\"}") - before;
            (asked == 0.0).then_some(served)
        });
        collected.collect(&collector);
        assert!(served.is_kept_by(&collected.ask(&served.url).bytes()), "{collector:?}");
        assert_eq!(collected.ask(&format!("nix-cache/{}.narinfo", hash_part(&collected.path))).status, 200);
    }
    assert!(collected.daemon.metric("peernix_relayed_bytes_total") > 0.0);

    // Nobody has it.
    drop(upstream);
    drop(peer);
    collected.host.build(LARGE);
    let served = eventually("it is served from here", || {
        let answer = collected.ask(&format!("nix-cache/{}.narinfo", hash_part(&collected.path)));
        (answer.status == 200).then(|| Served::of(&answer.text()))
    });
    collected.collect(&["nix-collect-garbage"]);
    // What was relayed a moment ago may still be at hand.
    eventually("it is gone", || match collected.ask(&served.url) {
        answer if answer.status == 200 => {
            assert!(served.is_kept_by(&answer.bytes()));
            None
        }
        answer => {
            assert_eq!(answer.status, 404);
            Some(())
        }
    });
    let said = "a NAR is gone: its path was collected after its narinfo was given out, and no peer gives it; Nix asks its next substituter";
    eventually("the log says so", || (!collected.daemon.logged(said).is_empty()).then_some(()));
}

#[test]
fn what_root_collected_after_its_lease_comes_from_a_peer_or_is_a_404() {
    comes_from_the_peer(As::Root);
}

#[test]
fn what_was_collected_through_nix_daemon_after_its_lease_comes_from_a_peer_or_is_a_404() {
    comes_from_the_peer(As::Nobody);
}

/// A collection that has read its roots and waits.
struct Waiting {
    process: Child,
    fifo: std::path::PathBuf,
}

impl Waiting {
    fn begin(collected: &Collected) -> Self {
        let fifo = collected.host.nix_folder().join("home/go-on");
        succeed(Command::new("mkfifo").arg(&fifo));
        let mut collect = collected.host.command("nix-collect-garbage");
        collect.env("_NIX_TEST_GC_SYNC", "/nix/home/go-on").stderr(Stdio::null()).stdout(Stdio::null());
        let process = collect.spawn().unwrap();
        eventually("the collection has read its roots", || {
            let waiting = run(collected.host.command("sh").args([
                "-c",
                "for p in /proc/[0-9]*; do case $(cat $p/wchan 2>/dev/null) in fifo_open|wait_for_partner) echo $p;; esac; done",
            ]));
            (!waiting.stdout.is_empty()).then_some(())
        });
        Self { process, fifo }
    }

    fn go_on(mut self) {
        std::fs::write(&self.fifo, "").unwrap();
        assert!(self.process.wait().unwrap().success());
    }
}

#[test]
fn a_collection_that_has_read_its_roots_leaves_what_is_leased_after_that() {
    for who in [As::Root, As::Nobody] {
        let collected = Collected::new(who, LARGE, "");
        let bystander = collected.host.build(DICE).remove(0);
        let waiting = Waiting::begin(&collected);
        let served = collected.narinfo();
        let mut nar = vec![0; 1 << 20];
        let mut rest = collected.ask(&served.url).reader();
        rest.read_exact(&mut nar).unwrap();
        waiting.go_on();
        rest.read_to_end(&mut nar).unwrap();
        assert!(served.is_kept_by(&nar));
        assert!(served.is_kept_by(&collected.ask(&served.url).bytes()));
        let real = collected.host.nix_folder().join(bystander.strip_prefix("/nix/").unwrap());
        assert!(!real.exists(), "nothing was collected");
    }
}

#[test]
fn a_path_that_is_half_collected_is_not_here() {
    let collected = Collected::new(As::Root, MANY, SOON);
    let below = collected.host.nix_folder().join(collected.path.strip_prefix("/nix/").unwrap()).join("below");
    let files = || std::fs::read_dir(&below).map_or(0, Iterator::count);
    // It may be through before it is stopped: then once more.
    let (served, mut delete) = eventually("it is stopped midway", || {
        collected.host.build(MANY);
        let served = collected.narinfo();
        assert!(served.is_kept_by(&collected.ask(&served.url).bytes()));
        let all = files();
        let mut delete = collected.nix(&["sh", "-c", "until nix-store --delete $0; do sleep 0.1; done"]);
        let delete = delete.arg(&collected.path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        eventually("some files are gone", || (files() < all).then_some(()));
        let stop = run(collected.host.command("pkill").args(["-STOP", "-f", "^nix-store --delete"]));
        (stop.status.success() && files() > 0).then_some((served, delete))
    });
    let narinfo = collected.ask(&format!("nix-cache/{}.narinfo", hash_part(&collected.path)));
    assert_eq!((narinfo.status, collected.ask(&served.url).status), (404, 404));
    succeed(collected.host.command("pkill").args(["-CONT", "-f", "^nix-store --delete"]));
    assert!(delete.wait().unwrap().success());
    assert_eq!(collected.ask(&served.url).status, 404);
}

#[test]
fn what_is_leased_outlives_the_process_that_leased_it() {
    for who in [As::Root, As::Nobody] {
        let collected = Collected::new(who, LARGE, "");
        let served = collected.narinfo();
        succeed(collected.host.command("pkill").args(["-KILL", "-f", SERVES]));
        // Without anybody asking.
        eventually("its lease is taken again", || {
            let metric = |name| collected.daemon.metric(name);
            let lost = metric("peernix_lease_failures_total") >= 1.0;
            (lost && metric("peernix_store_leases") >= 1.0).then_some(())
        });
        for collector in collected.collectors() {
            run(&mut collected.nix(&collector));
            assert!(collected.is_there(), "{collector:?}");
        }
        assert!(served.is_kept_by(&collected.ask(&served.url).bytes()));
    }
}

#[test]
fn a_nar_whose_lease_is_lost_and_whose_path_is_collected_is_cut() {
    // Read from its tree alone: a copy would have all of it before the first file goes.
    let collected = Collected::new(As::Root, MANY, "[limits]\nnar_copies = \"0\"\n");
    let served = collected.narinfo();
    let mut nar = vec![0; 1 << 16];
    let mut rest = collected.ask(&served.url).reader();
    rest.read_exact(&mut nar).unwrap();
    // The process that holds the lease dies, and each that would lease it again, until the path is collected.
    eventually("it is collected", || {
        // What some process has open is alive for Nix, and the daemon has one of the files open.
        let delete =
            "while :; do pkill -KILL -f \"$1\"; done & nix-store --delete --ignore-liveness \"$0\"; kill $!";
        run(&mut collected.nix(&["sh", "-c", delete, &collected.path, SERVES]));
        (!collected.is_there()).then_some(())
    });
    assert!(rest.read_to_end(&mut nar).is_err(), "{} bytes came as if they were all", nar.len());
    eventually("it is counted", || {
        (collected.daemon.metric("peernix_http_nar_cuts_total") == 1.0).then_some(())
    });
    assert_eq!(collected.ask(&served.url).status, 404);
    assert!(collected.daemon.metric("peernix_lease_failures_total") >= 1.0);
}

#[test]
fn without_nix_daemon_what_is_remembered_is_looked_at_and_served() {
    let mut collected = Collected::new(As::Nobody, LARGE, "");
    let served = collected.narinfo();
    collected.host.stop_nix_daemon();
    let status = || collected.ask(&format!("nix-cache/{}.narinfo", hash_part(&collected.path))).status;
    eventually("the lease is lost", || {
        (collected.daemon.metric("peernix_lease_failures_total") >= 1.0).then_some(())
    });
    assert_eq!(status(), 200);
    assert!(served.is_kept_by(&collected.ask(&served.url).bytes()));
    // Somebody is about to change it.
    let real = collected.host.nix_folder().join(collected.path.strip_prefix("/nix/").unwrap());
    let lock = real.with_file_name(format!("{}.lock", real.file_name().unwrap().to_str().unwrap()));
    std::fs::write(&lock, "").unwrap();
    assert_eq!((status(), collected.ask(&served.url).status), (404, 404));
    std::fs::remove_file(&lock).unwrap();
    assert_eq!(status(), 200);
    // Root needs no nix-daemon, and nothing holds the path.
    succeed(collected.host.command("nix-store").args(["--delete", &collected.path]));
    assert_eq!((status(), collected.ask(&served.url).status), (404, 404));
}

#[test]
fn a_path_that_is_built_again_with_other_content_is_served_anew() {
    let collected = Collected::new(As::Root, DICE, SOON);
    let mut before = collected.narinfo();
    for _ in 0..3 {
        collected.collect(&["nix-store", "--delete", &collected.path]);
        assert_eq!(collected.host.build(DICE)[0], collected.path);
        let after = collected.narinfo();
        assert_ne!(after.nar_hash, before.nar_hash);
        let stored = text(collected.host.command("nix-store").args(["--query", "--hash", &collected.path]));
        assert_eq!(after.nar_hash, stored);
        assert!(after.is_kept_by(&collected.ask(&after.url).bytes()));
        // Another NAR than the one that was promised is not given in its place.
        assert_eq!(collected.ask(&before.url).status, 404);
        before = after;
    }
}

/// Hours later, in little: the narinfo came from the local store, so that no peer was on record for it.
#[test]
fn what_was_local_before_a_restart_and_is_collected_comes_from_a_peer_after_it() {
    let lan = Lan::new();
    let (one, two, three) = (lan.host(1, ""), lan.host(2, ""), lan.host(3, ""));
    let expression = "derivation { name = \"both\"; system = builtins.currentSystem; builder = \"/bin/sh\";
        args = [ \"-c\" \"echo both > $out\" ]; }";
    let path = two.build(expression).remove(0);
    assert_eq!(one.build(expression)[0], path);
    let _second = Daemon::start_as_configured(two.command(PROGRAM), "[discovery]\n");
    let _third = Daemon::start_as_configured(three.command(PROGRAM), "[discovery]\n");
    let settings = format!(
        "[discovery]\n[trust]\npublic_keys = [{:?}]\nhost_keys = false\n[state]\ndirectory = \"/nix/home/state\"",
        key(&two)
    );
    let mut first = Daemon::start_as_configured(one.command(PROGRAM), &settings);
    let (status, narinfo) = ask(&one, &format!("nix-cache/{}.narinfo", hash_part(&path)));
    assert_eq!((status, metric(&one, "peernix_peer_requests_total{outcome=\"ok\"}")), (200, 0.0));
    let served = Served::of(&narinfo);
    signal(&one, "-TERM");
    assert!(first.wait().success());
    // The next start believes nothing of what is remembered.
    let names = std::fs::read_to_string(one.nix_folder().join("home/state/names")).unwrap();
    assert!(names.lines().any(|name| path.ends_with(name)));
    succeed(one.command("nix-collect-garbage").args(["--option", "keep-derivations", "false"]));
    assert!(!one.nix_folder().join(path.strip_prefix("/nix/").unwrap()).exists());
    let _again = Daemon::start_as_configured(one.command(PROGRAM), &settings);
    eventually("the peers are known", || (metric(&one, "peernix_peers") == 2.0).then_some(()));
    let (status, nar) = ask(&one, &served.url);
    assert_eq!(status, 200);
    assert!(served.is_kept_by(nar.as_bytes()));
    // The third lacks it as well, asks nobody it trusts, and says so.
    assert_eq!(ask(&three, &served.url).0, 404);
}
