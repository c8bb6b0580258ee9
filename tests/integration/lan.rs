//! Hosts on a LAN, each with a network, a /nix and a daemon of its own that nobody configured.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::narinfo::hash_part;
use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::host::Host;
use crate::support::lan::{Lan, ask, key, let_through, metric, requisites, signal, swallow};
use crate::support::{eventually, run, succeed, text};

const SUBSTITUTER: &str = "substituters = http://127.0.0.1:9999/nix-cache\nrequire-sigs = true\n";

/// The daemon as it is without any configuration, but for what a test has to wait for otherwise.
fn daemon(host: &Host, settings: &str) -> Daemon {
    Daemon::start_as_configured(host.command(PROGRAM), &format!("[discovery]\n{settings}"))
}

fn knows(host: &Host, count: usize) {
    eventually("the peers are known", || (metric(host, "peernix_peers") == count as f64).then_some(()));
}

fn chain(name: &str, length: usize) -> String {
    format!(
        r#"let link = before: n: derivation {{
             name = "{name}-${{toString n}}"; inherit before; system = builtins.currentSystem;
             builder = "/bin/sh"; args = [ "-c" "echo $before $out > $out" ]; }};
           in builtins.foldl' link "end" (builtins.genList (n: n) {length})"#
    )
}

fn narinfo_of(path: &str) -> String {
    format!("nix-cache/{}.narinfo", hash_part(path))
}

#[test]
fn paths_of_two_hosts_are_realised_on_a_third_that_was_told_nothing_but_keys() {
    let lan = Lan::new();
    let (one, two, three) = (lan.host(1, ""), lan.host(2, ""), lan.host(3, SUBSTITUTER));
    let (first, second) = (one.build(&chain("one", 150)).remove(0), two.build(&chain("two", 150)).remove(0));
    let daemons = [daemon(&one, ""), daemon(&two, ""), daemon(&three, "")];
    let began = Instant::now();
    for host in [&one, &two, &three] {
        knows(host, 2);
    }
    let found = began.elapsed();
    assert!(found < Duration::from_secs(20), "found after {found:?}");

    // Nobody trusts the builders yet: the paths are there, and not passed on.
    assert_eq!(ask(&three, &narinfo_of(&first)).0, 404);
    let is_shown = |trusted: &str| {
        let table = text(three.command(PROGRAM).arg("peers"));
        assert_eq!(table.lines().count(), 3, "{table}");
        for host in [&one, &two] {
            let name = key(host).split_once(':').unwrap().0.to_owned();
            let mut rows = table.lines().map(str::split_whitespace).map(Iterator::collect::<Vec<_>>);
            assert!(rows.any(|row| row[..2] == [&*name, trusted]), "{name}, {trusted}: {table}");
        }
    };
    is_shown("no");
    three.configure(&format!(
        "{SUBSTITUTER}trusted-public-keys = {} {} {}",
        key(&one),
        key(&two),
        key(&three)
    ));
    eventually("the daemon follows nix.conf", || (ask(&three, &narinfo_of(&first)).0 == 200).then_some(()));
    let no_memory = ["--option", "narinfo-cache-negative-ttl", "0"];
    succeed(three.command("nix-store").args(["--realise", &first, &second]).args(no_memory));
    assert_eq!(requisites(&three, &first), requisites(&one, &first));
    assert_eq!(requisites(&three, &second), requisites(&two, &second));
    succeed(three.command("nix-store").args(["--verify", "--check-contents"]));
    let (_, peers) = ask(&three, "api/v1/peers");
    assert!(peers.contains("\"source\"") && peers.contains("10.77.0.1"), "{peers}");
    is_shown("yes");
    drop(daemons);
}

#[test]
fn a_host_that_leaves_in_any_way_costs_no_more_than_the_budget_and_is_used_again_when_it_is_back() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, SUBSTITUTER));
    let path = one.build(&chain("one", 1)).remove(0);
    let quick = "mdns = false\ninterval = \"500ms\"\nttl = \"2s\"";
    let mut there = daemon(&one, quick);
    let trusted = key(&one);
    let settings = format!(
        "{quick}\n[trust]\npublic_keys = [{trusted:?}]\nhost_keys = false\n[cache]\nnegative_ttl = \"1s\""
    );
    let here = daemon(&two, &settings);
    knows(&two, 1);
    assert_eq!(ask(&two, &narinfo_of(&path)).0, 200);
    let missing = |number: usize| format!("nix-cache/{number:0>32}.narinfo");
    let is_gone_and_costs_nothing = |round: usize| {
        let mut asked = 0;
        eventually("the peer is gone from the list", || {
            let began = Instant::now();
            assert_eq!(ask(&two, &missing(round * 1000 + asked)).0, 404);
            // curl's own start is in this time too, on a machine that is busy.
            assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
            asked += 1;
            (metric(&two, "peernix_peers") == 0.0).then_some(())
        });
    };
    let is_back = || {
        knows(&two, 1);
        eventually("it is used again", || (ask(&two, &narinfo_of(&path)).0 == 200).then_some(()));
    };
    lan.cable(1, "down");
    is_gone_and_costs_nothing(1);
    lan.cable(1, "up");
    is_back();
    swallow(&one);
    is_gone_and_costs_nothing(2);
    let_through(&one);
    is_back();
    signal(&one, "-KILL");
    there.wait();
    is_gone_and_costs_nothing(3);
    let _again = daemon(&one, quick);
    assert_ne!(key(&one), trusted, "a fresh state folder has a fresh key");
    knows(&two, 1);
    drop(here);
}

/// So seldom that what is found is found by something else.
const SELDOM: &str = "mdns = false\ninterval = \"10min\"\nttl = \"1h\"";

#[test]
fn a_goodbye_is_heard_at_once_and_known_peers_are_checked_after_a_restart() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    let mut first = daemon(&one, SELDOM);
    let state = "[state]\ndirectory = \"/nix/home/state\"";
    let mut second = daemon(&two, &format!("{SELDOM}\n{state}"));
    knows(&two, 1);
    signal(&two, "-TERM");
    assert!(second.wait().success());
    // From a port that the system chooses it can't broadcast: it knows whom it knew.
    let _again = daemon(&two, &format!("{SELDOM}\nport = 0\n{state}"));
    let checked = "peernix_peer_requests_total{outcome=\"ok\"}";
    eventually("the saved peer is checked", || (metric(&two, checked) >= 1.0).then_some(()));
    knows(&two, 1);
    drop(second);

    let third = lan.host(3, "");
    let _third = daemon(&third, SELDOM);
    knows(&third, 1);
    signal(&one, "-TERM");
    assert!(first.wait().success());
    knows(&third, 0);
}

#[test]
fn a_network_that_comes_late_and_one_of_ipv6_alone_are_announced_on() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    for host in [&one, &two] {
        succeed(host.command("ip").args(["-4", "address", "flush", "dev", "eth0"]));
        succeed(host.command("ip").args(["link", "set", "eth0", "down"]));
    }
    let (_first, _second) = (daemon(&one, SELDOM), daemon(&two, SELDOM));
    assert_eq!(ask(&one, "health").0, 200);
    for host in [&one, &two] {
        succeed(host.command("ip").args(["link", "set", "eth0", "up"]));
    }
    knows(&one, 1);
    knows(&two, 1);
    let (_, peers) = ask(&one, "api/v1/peers");
    assert!(peers.contains("fe80::"), "{peers}");
    // And they can be asked there.
    let path = two.build(&chain("two", 1)).remove(0);
    eventually("they are asked", || {
        ask(&one, &narinfo_of(&path));
        (metric(&one, "peernix_untrusted_narinfos_total") > 0.0).then_some(())
    });
}

#[test]
fn multicast_dns_alone_finds_peers_too() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    // Ports that the system chooses can't be broadcast to.
    let (_first, _second) = (daemon(&one, "port = 0"), daemon(&two, "port = 0"));
    knows(&one, 1);
    knows(&two, 1);
    let (_, peers) = ask(&two, "api/v1/peers");
    assert!(peers.contains("\"mdns\""), "{peers}");
}

#[test]
fn a_new_peer_and_a_path_that_was_just_gained_are_found_in_spite_of_remembered_misses() {
    let lan = Lan::new();
    let (one, two, three) = (lan.host(1, ""), lan.host(2, ""), lan.host(3, ""));
    let _builder = daemon(&one, "");
    let settings = format!(
        "\n[trust]\npublic_keys = [{:?}]\nhost_keys = false\n[cache]\nnegative_ttl = \"1h\"",
        key(&one)
    );
    let _asker = daemon(&two, &settings);
    knows(&two, 1);
    // The path that will be: built elsewhere first, to know its name.
    let expression = chain("later", 1);
    let path = three.build(&expression).remove(0);
    assert_eq!(ask(&two, &narinfo_of(&path)).0, 404);
    let asked = || metric(&two, "peernix_peer_requests_total{outcome=\"ok\"}");
    let before = asked();
    assert_eq!(ask(&two, &narinfo_of(&path)).0, 404);
    assert_eq!(asked(), before, "a remembered miss was asked about");
    assert_eq!(one.build(&expression).remove(0), path);
    eventually("the gained path is found", || (ask(&two, &narinfo_of(&path)).0 == 200).then_some(()));

    let only = three.build(&chain("only-there", 1)).remove(0);
    assert_eq!(ask(&two, &narinfo_of(&only)).0, 404);
    let _third = daemon(&three, "");
    knows(&two, 2);
    let before = metric(&two, "peernix_untrusted_narinfos_total");
    eventually("the new peer is asked", || {
        assert_eq!(ask(&two, &narinfo_of(&only)).0, 404);
        (metric(&two, "peernix_untrusted_narinfos_total") > before).then_some(())
    });
}

#[test]
fn three_hosts_that_all_lack_a_path_ask_each_other_once() {
    let lan = Lan::new();
    let hosts = [lan.host(1, ""), lan.host(2, ""), lan.host(3, "")];
    // Hosts that told what they hold would not be asked at all.
    let _daemons = hosts.each_ref().map(|host| daemon(host, "[share]\nholdings = false"));
    for host in &hosts {
        knows(host, 2);
    }
    let requests =
        |host: &Host| metric(host, "peernix_http_requests_total{route=\"narinfo\",status=\"404\"}");
    assert_eq!(ask(&hosts[0], &format!("nix-cache/{}.narinfo", "0".repeat(32))).0, 404);
    // One from its own client; one each from the first host's daemon; and none that they sent on.
    assert_eq!(hosts.each_ref().map(requests), [1.0, 1.0, 1.0]);
    // A stranger on the LAN gets what is here, and makes nobody ask.
    let url = format!("http://10.77.0.2:9999/nix-cache/{}.narinfo", "1".repeat(32));
    let answer =
        run(hosts[0].command("curl").args(["--silent", "-w", "%{http_code}", "-o", "/dev/null", &url]));
    assert_eq!(answer.stdout, b"404");
    assert_eq!(hosts.each_ref().map(requests), [1.0, 2.0, 1.0]);
}

#[test]
fn a_peer_that_is_known_by_a_link_local_address_is_found_again_after_a_restart() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    for host in [&one, &two] {
        succeed(host.command("ip").args(["-4", "address", "flush", "dev", "eth0"]));
    }
    let _first = daemon(&one, SELDOM);
    let state = "[state]\ndirectory = \"/nix/home/state\"";
    let mut second = daemon(&two, &format!("{SELDOM}\n{state}"));
    knows(&two, 1);
    assert!(ask(&two, "api/v1/peers").1.contains("fe80::"));
    signal(&two, "-TERM");
    assert!(second.wait().success());
    // From a port that the system chooses it can't broadcast: it knows whom it knew.
    let _again = daemon(&two, &format!("{SELDOM}\nport = 0\n{state}"));
    let checked = "peernix_peer_requests_total{outcome=\"ok\"}";
    eventually("the saved peer is checked", || (metric(&two, checked) >= 1.0).then_some(()));
}

#[test]
fn a_host_that_listens_on_one_family_is_found_and_asked_by_that_one_alone() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    let path = one.build(&chain("one", 1)).remove(0);
    succeed(two.command("ip").args(["-4", "address", "flush", "dev", "eth0"]));
    let often = "interval = \"500ms\"\nttl = \"1h\"";
    let listen = "[http]\nlisten = [\"127.0.0.1:9999\", \"10.77.0.1:9999\"]";
    let _first = daemon(&one, &format!("{often}\n{listen}"));
    let second = daemon(&two, often);
    // By IPv6, the only one that both have.
    knows(&one, 1);
    let received = || metric(&two, "peernix_discovery_datagrams_received_total{outcome=\"understood\"}");
    let before = received();
    succeed(two.command("ip").args(["address", "add", "10.77.0.2/24", "broadcast", "+", "dev", "eth0"]));
    knows(&two, 1);
    eventually("it was announced often", || (received() > before + 10.0).then_some(()));
    assert!(!ask(&two, "api/v1/peers").1.contains("fe80::"), "{}", ask(&two, "api/v1/peers").1);
    ask(&two, &narinfo_of(&path));
    assert_eq!(metric(&two, "peernix_untrusted_narinfos_total"), 1.0);
    assert_eq!(second.logged("a peer failed and is not asked for a while").len(), 0);
}

#[test]
fn a_host_that_others_cannot_reach_finds_them_and_is_not_announced() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    let often = "interval = \"500ms\"\nttl = \"1h\"";
    let listen = "[http]\nlisten = [\"127.0.0.1:9999\", \"[::1]:9999\"]";
    let first = daemon(&one, &format!("{often}\n{listen}"));
    let _second = daemon(&two, often);
    knows(&one, 1);
    let sent = "peernix_discovery_datagrams_sent_total";
    let before = metric(&two, sent);
    eventually("it announced itself often", || (metric(&two, sent) > before + 10.0).then_some(()));
    assert_eq!((metric(&one, sent), metric(&two, "peernix_peers")), (0.0, 0.0));
    let why = "not announced on the LAN: only this host can reach what http.listen names; peers are found all the same";
    assert_eq!(first.logged(why).len(), 1);
    let path = two.build(&chain("two", 1)).remove(0);
    eventually("they are asked", || {
        ask(&one, &narinfo_of(&path));
        (metric(&one, "peernix_untrusted_narinfos_total") > 0.0).then_some(())
    });
}

/// What the kernel knows of the connection from port 9999 of the host to this client.
fn connection_to(host: &Host, client: &str) -> Option<Vec<String>> {
    let told = text(host.command("ss").args(["-Htin", "sport", "=", ":9999", "and", "dst", client]));
    // Below a line of addresses.
    Some(told.lines().nth(1)?.split_whitespace().map(str::to_owned).collect())
}

#[test]
fn loopback_is_not_paced_and_other_hosts_are_sent_to_as_the_system_wants() {
    let lan = Lan::new();
    let (one, two) = (lan.host(1, ""), lan.host(2, ""));
    // Where the kernel has it, and lets a host in a namespace choose it.
    let _ = run(one.command("sysctl").args(["-qw", "net.ipv4.tcp_congestion_control=bbr"]));
    let usual = text(one.command("sysctl").args(["-n", "net.ipv4.tcp_congestion_control"]));
    let usual = usual.trim();
    let within = if usual == "bbr" { "reno" } else { usual };
    let _daemon = daemon(&one, "");
    // Connections that have been answered, and stay.
    let connect = |host: &Host, address: &str| {
        let script = format!(
            "exec 3<>/dev/tcp/{address}/9999 && printf 'GET /health HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' >&3 &&
             read -r status <&3 && echo $status && exec sleep infinity"
        );
        let mut client = host.command("bash").args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut status = String::new();
        BufReader::new(client.stdout.take().unwrap()).read_line(&mut status).unwrap();
        assert!(status.starts_with("HTTP/1.1 200"), "{status}");
        client
    };
    // The last asks its own host by its address on the LAN.
    let mut clients = [connect(&one, "127.0.0.1"), connect(&two, "10.77.0.1"), connect(&one, "10.77.0.1")];
    for (client, expected) in [("127.0.0.1", within), ("10.77.0.2", usual), ("10.77.0.1", within)] {
        let known = connection_to(&one, client).unwrap();
        assert!(known.iter().any(|word| word == expected), "{client} by {expected}: {known:?}");
    }
    for client in &mut clients {
        let _ = client.kill();
        let _ = client.wait();
    }
}
