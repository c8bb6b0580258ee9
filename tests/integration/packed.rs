//! NARs as zstd: between peers where the link is slow, and for plain clients that are offered them so.

use std::path::Path;
use std::process::Command;

use crate::narinfo::{field, hash_part};
use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::host::Host;
use crate::support::http::{get, get_with, head};
use crate::support::lan::{Lan, ask, key, metric};
use crate::support::scripted::{Honest, Script, Scripted, honest};
use crate::support::{eventually, run, succeed};

/// Five paths of 3 to 7 MB of text.
const TEXTS: &str = r#"
  map (n: derivation {
    name = "text-${toString n}"; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" ''
      block="line of text number ${toString n}, and some more of it;"
      for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do block=$block$block; done
      i=0
      while [ $i -lt ${toString n} ]; do printf %s "$block"; i=$((i+1)); done > $out
    '' ];
  }) [ 3 4 5 6 7 ]"#;

/// What `host` sends goes through a link of this rate.
fn shape(host: &Host, rate: &str) {
    let qdisc = ["qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate];
    succeed(host.command("tc").args(qdisc).args(["burst", "64k", "latency", "50ms"]));
}

/// A file of the host's own daemon, got from within. `None`: not all of it came, or 404.
fn fetched(host: &Host, url: &str) -> Option<Vec<u8>> {
    let got = run(host.command("curl").args(["--silent", "--fail", "--max-time", "60", url]));
    got.status.success().then_some(got.stdout)
}

const PEER: &str = "x-peernix-peer: 0123456789abcdef";
const ZSTD: &str = "Accept-Encoding: zstd";
const SLOW: &str = "x-peernix-link: 12000000";

/// The headers of an answer, in small letters, and its body.
fn asked(host: &Host, url: &str, headers: &[&str]) -> (String, Vec<u8>) {
    let mut curl = host.command("curl");
    curl.args(["--silent", "--dump-header", "/nix/home/head", url]);
    for header in headers {
        curl.args(["-H", header]);
    }
    let body = succeed(&mut curl);
    let head = std::fs::read_to_string(host.nix_folder().join("home/head")).unwrap();
    (head.to_lowercase(), body)
}

fn alone(host: &Host, settings: &str) -> Daemon {
    Daemon::start_as_configured(host.command(PROGRAM), &format!("[discovery]\nenable = false\n{settings}"))
}

#[test]
fn nars_travel_as_zstd_over_a_slow_link_and_reach_the_client_as_they_are() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    let paths = one.build(TEXTS);
    let _holder = alone(&one, "");
    let (trust, peer) = (
        format!("[trust]\npublic_keys = [{:?}]\nhost_keys = false", key(&one)),
        "url = \"http://10.77.0.1:9999/nix-cache\"",
    );
    let _asker = alone(&two, &format!("{trust}\n[[peer]]\n{peer}"));
    shape(&one, "100mbit");
    let mut nar_bytes = 0;
    for path in &paths {
        let (status, narinfo) = ask(&two, &format!("nix-cache/{}.narinfo", hash_part(path)));
        assert_eq!((status, &*field(&narinfo, "Compression").unwrap()), (200, "none"));
        let url = format!("http://127.0.0.1:9999/nix-cache/{}", field(&narinfo, "URL").unwrap());
        let (there, here) = (fetched(&one, &url).unwrap(), fetched(&two, &url).unwrap());
        assert!(there == here, "{path}");
        nar_bytes += here.len();
    }
    // The first shows what the link carries. The text nearly vanishes.
    let first = metric(&one, "peernix_zstd_input_bytes_total");
    assert!(first > nar_bytes as f64 / 2.0, "{first} of {nar_bytes}");
    assert!(metric(&one, "peernix_zstd_output_bytes_total") < first / 10.0);
    assert!(metric(&two, "peernix_wire_bytes_total") < nar_bytes as f64 / 2.0);
    assert_eq!(metric(&two, "peernix_relayed_bytes_total"), nar_bytes as f64);
    assert_eq!(metric(&two, "peernix_relay_failovers_total"), 0.0);
}

#[test]
fn a_peer_gets_zstd_for_all_of_a_nar_by_a_slow_link_and_nobody_by_loopback_or_in_parts() {
    let lan = Lan::new();
    let one = lan.host(1, "");
    let path = one.build(TEXTS).remove(0);
    let _holder = alone(&one, "");
    let (_, narinfo) = ask(&one, &format!("nix-cache/{}.narinfo", hash_part(&path)));
    let nar_path = field(&narinfo, "URL").unwrap();
    let [loopback, lan] =
        ["127.0.0.1", "10.77.0.1"].map(|host| format!("http://{host}:9999/nix-cache/{nar_path}"));
    let nar = fetched(&one, &loopback).unwrap();

    let (head, body) = asked(&one, &lan, &[PEER, ZSTD, SLOW]);
    assert!(head.contains("content-encoding: zstd") && head.contains("vary: accept-encoding"), "{head}");
    assert!(!head.contains("content-length") && !head.contains("accept-ranges"), "{head}");
    assert!(zstd::stream::decode_all(&body[..]).unwrap() == nar);
    let as_it_is = |what: &str, (head, body): (String, Vec<u8>), expected: &[u8]| {
        assert!(!head.contains("content-encoding"), "{what}: {head}");
        assert!(head.contains(&format!("content-length: {}", expected.len())), "{what}: {head}");
        assert!(body == expected, "{what}");
    };
    // Faster than any machine packs, even a text that nearly vanishes.
    let (part, fast) = ("Range: bytes=1000-1999", "x-peernix-link: 1000000000000000");
    as_it_is("loopback", asked(&one, &loopback, &[PEER, ZSTD, SLOW]), &nar);
    as_it_is("a part", asked(&one, &lan, &[PEER, ZSTD, SLOW, part]), &nar[1000..2000]);
    as_it_is("a fast link", asked(&one, &lan, &[PEER, ZSTD, fast]), &nar);
    as_it_is("no link", asked(&one, &lan, &[PEER, ZSTD]), &nar);
    as_it_is("no link that is one", asked(&one, &lan, &[PEER, ZSTD, "x-peernix-link: -1"]), &nar);
    as_it_is("no peer", asked(&one, &lan, &[ZSTD, SLOW]), &nar);
    as_it_is("no zstd", asked(&one, &lan, &[PEER, "Accept-Encoding: gzip", SLOW]), &nar);
    assert_eq!(metric(&one, "peernix_zstd_input_bytes_total"), nar.len() as f64);
}

/// A peer that gives the NAR as it is, and something else as zstd; and a better one, if it is to be mended.
fn lies(honest: &Honest, what: &str, zstd: &[u8], is_mended: bool) {
    let lan = Lan::new();
    let (liars, two) = (lan.host(1, ""), lan.host(2, ""));
    shape(&liars, "200mbit");
    let say = |zstd: Option<Vec<u8>>, later: bool| {
        let upstream = honest.daemon.url("nix-cache");
        move |path: &str| {
            let truth = get(&format!("{upstream}/{path}"));
            if later && path.ends_with(".narinfo") {
                // The other one is asked first then.
                std::thread::sleep(std::time::Duration::from_millis(400));
            }
            let zstd = zstd.clone().filter(|_| path.ends_with(".nar"));
            Script { status: truth.status, zstd, ..Script::ok(truth.bytes()) }
        }
    };
    let liar = Scripted::start_in(&liars, "10.77.0.1:5001", say(Some(zstd.to_vec()), false));
    let better = Scripted::start_in(&liars, "10.77.0.1:5002", say(None, true));
    let mut settings = format!(
        "[resolve]\nnarinfo_budget = \"5s\"\n[trust]\npublic_keys = [{:?}]\nhost_keys = false\n",
        honest.key
    );
    let urls = if is_mended { vec![liar.url(), better.url()] } else { vec![liar.url()] };
    urls.iter().for_each(|url| settings.push_str(&format!("[[peer]]\nurl = {url:?}\n")));
    let daemon = alone(&two, &settings);
    let narinfo = format!("nix-cache/{}.narinfo", hash_part(&honest.path));
    assert_eq!(ask(&two, &narinfo).0, 200);
    let url = format!("http://127.0.0.1:9999/{}", honest.nar_url);
    assert!(fetched(&two, &url).unwrap() == honest.nar, "{what}");
    assert_eq!(liar.asked_for("as zstd"), 0, "the link was not measured yet");
    let second = fetched(&two, &url);
    assert_eq!(liar.asked_for("as zstd"), 1, "{what}: {:?}", daemon.log());
    assert!(second.as_ref().is_none_or(|bytes| *bytes == honest.nar), "{what}: bad bytes");
    assert_eq!(second.is_some(), is_mended, "{what}");
}

#[test]
fn what_a_peer_packs_wrongly_is_mended_by_another_and_never_passed_on() {
    // Large enough to be streamed, and to be asked for again each time.
    let honest = honest(20 << 20);
    let packed = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
    let right = packed(&honest.nar);
    let mut other = honest.nar.clone();
    other[100] ^= 1;
    let longer = [&honest.nar[..honest.nar.len() - 1], &vec![0; 64 << 20]].concat();
    let half = &right[..right.len() / 2];
    lies(&honest, "half a frame", half, true);
    lies(&honest, "no zstd", &honest.nar[..1 << 20], true);
    lies(&honest, "a whole frame of half the NAR", &packed(&honest.nar[..honest.nar.len() / 2]), true);
    lies(&honest, "other bytes", &packed(&other), false);
    lies(&honest, "a bomb", &packed(&longer), false);
}

#[test]
fn clients_are_offered_zstd_where_that_is_configured_and_peers_are_not() {
    let builder = Host::new("");
    let paths = builder.build(TEXTS);
    let daemon = Daemon::start(builder.command(PROGRAM), "[http]\ncompression = \"zstd\"");
    let narinfo_url = daemon.url(&format!("nix-cache/{}.narinfo", hash_part(&paths[0])));
    let of_peer = get_with(&narinfo_url, &[("x-peernix-peer", "0123456789abcdef")]).text();
    // Once looked up, once remembered.
    for narinfo in [get(&narinfo_url).text(), get(&narinfo_url).text()] {
        assert_eq!(field(&narinfo, "Compression").unwrap(), "zstd");
        assert_eq!(field(&narinfo, "URL").unwrap(), format!("{}.zst", field(&of_peer, "URL").unwrap()));
        assert_eq!((field(&narinfo, "FileHash"), field(&narinfo, "FileSize")), (None, None));
        assert_eq!(field(&narinfo, "Sig"), field(&of_peer, "Sig"));
    }
    assert_eq!(field(&of_peer, "Compression").unwrap(), "none");
    let plain_url = daemon.url(&format!("nix-cache/{}", field(&of_peer, "URL").unwrap()));
    let packed_url = format!("{plain_url}.zst");
    let nar = get(&plain_url).bytes();
    let packed = get_with(&packed_url, &[("range", "bytes=5-9")]);
    assert_eq!(
        (packed.status, packed.header("content-length"), packed.header("content-encoding")),
        (200, None, None)
    );
    let packed = packed.bytes();
    assert!(packed.len() < nar.len() / 10 && zstd::stream::decode_all(&packed[..]).unwrap() == nar);
    assert_eq!((head(&packed_url).status, head(&packed_url).header("content-length")), (200, None));

    let trusted = get(&daemon.url("public-key")).text().trim().to_owned();
    let client = Host::new(&format!(
        "substituters = {}\ntrusted-public-keys = {trusted}\nrequire-sigs = true\n",
        daemon.substituter()
    ));
    succeed(client.command("nix-store").arg("--realise").args(&paths));
    succeed(client.command("nix-store").args(["--verify", "--check-contents"]));
    let other = Host::new(&format!("trusted-public-keys = {trusted}\nrequire-sigs = true\n"));
    succeed(other.command("nix").args(["copy", "--from", &daemon.substituter()]).args(&paths));
    for path in &paths {
        for host in [&client, &other] {
            same(&builder.nix_folder(), &host.nix_folder(), path);
        }
    }
    assert!(
        eventually("all was packed", || Some(daemon.metric("peernix_zstd_input_bytes_total")))
            > 3.0 * nar.len() as f64
    );
}

fn same(one: &Path, other: &Path, path: &str) {
    let [one, other] = [one, other].map(|nix| nix.join(path.strip_prefix("/nix/").unwrap()));
    succeed(Command::new("cmp").arg(one).arg(other));
}
