//! Peers that are honest, that lie, that stall, and that speak as peernix in Go does. On loopback: the scripted ones are
//! named by the configuration, or find the daemon by datagram.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::narinfo::{field, hash_part};
use crate::signatures::BUILT;
use crate::support::daemon::Daemon;
use crate::support::eventually;
use crate::support::http::{get, get_with};
use crate::support::scripted::{Script, Scripted, Then, ask, honest, relaying};
use crate::support::store::Store;

#[test]
fn a_path_comes_from_a_peer_verified_and_signed_again() {
    for size in [1000, 20 << 20] {
        let honest = honest(size);
        let (_store, daemon) = relaying(&honest.key, &[honest.daemon.substituter()], "");
        let told = ask(&daemon, &honest.path);
        assert_eq!(told.status, 200);
        let told = told.text();
        assert_eq!(field(&told, "URL"), Some(honest.nar_url.clone()));
        let names: Vec<String> = field(&told, "Sig")
            .unwrap()
            .split(' ')
            .map(|sig| sig.split(':').next().unwrap().to_owned())
            .collect();
        let own = get(&daemon.url("public-key")).text();
        assert_eq!(names, [honest.key.split(':').next().unwrap(), own.split(':').next().unwrap()]);
        let nar = get(&daemon.url(&honest.nar_url));
        assert_eq!(nar.header("content-length"), Some(&*honest.nar.len().to_string()));
        assert!(nar.bytes() == honest.nar, "{size}");
        assert_eq!(daemon.metric("peernix_relayed_bytes_total"), honest.nar.len() as f64);
    }
}

#[test]
fn the_url_of_a_nar_is_enough_after_a_restart() {
    let honest = honest(1000);
    let (_one, first) = relaying(&honest.key, &[honest.daemon.substituter()], "");
    let url = field(&ask(&first, &honest.path).text(), "URL").unwrap();
    let (_two, second) = relaying(&honest.key, &[honest.daemon.substituter()], "");
    assert!(get(&second.url(&url)).bytes() == honest.nar);
    // Of another NarHash there is none.
    let other = url.replace(&field(&honest.narinfo, "NarHash").unwrap()["sha256:".len()..], &"0".repeat(52));
    assert_eq!(get(&second.url(&other)).status, 404);
}

#[test]
fn a_request_of_a_peer_and_of_strangers_stays_on_the_host() {
    let honest = honest(1000);
    let (_store, daemon) = relaying(&honest.key, &[honest.daemon.substituter()], "");
    let url = daemon.url(&format!("{}.narinfo", hash_part(&honest.path)));
    assert_eq!(get_with(&url, &[("x-peernix-peer", "somebody")]).status, 404);
    assert_eq!(get_with(&daemon.url(&honest.nar_url), &[("x-peernix-peer", "somebody")]).status, 404);
    assert_eq!(get(&url).status, 200);
}

#[test]
fn what_nobody_trusted_has_signed_is_not_passed_on_unless_that_is_left_to_the_client() {
    let honest = honest(1000);
    let stranger = crate::signatures::nix_key(&Store::new(), "stranger-1").1;
    let (_store, daemon) = relaying(&stranger, &[honest.daemon.substituter()], "");
    assert_eq!(ask(&daemon, &honest.path).status, 404);
    assert_eq!(daemon.metric("peernix_untrusted_narinfos_total"), 1.0);
    let told = eventually("why is told", || daemon.logged("a peer's path is not passed on").pop());
    assert_eq!(told["peer.url"], honest.daemon.substituter());
    assert_eq!(told["signed_by"], honest.key.split(':').next().unwrap());

    let store = Store::new();
    let url = honest.daemon.substituter();
    let settings = format!("[trust]\nunsigned = \"relay\"\nhost_keys = false\n[[peer]]\nurl = {url:?}\n");
    let lax = Daemon::serve(store.root(), &settings);
    let told = ask(&lax, &honest.path).text();
    assert_eq!(
        field(&told, "Sig"),
        field(&honest.narinfo, "Sig"),
        "what is unproven must not get our signature"
    );

    // A content address is a proof by itself.
    let source = Store::new();
    let text = source.add_text("text", "content-addressed");
    let other = Daemon::serve(source.root(), "");
    let (_store, daemon) = relaying(&stranger, &[other.substituter()], "");
    let told = ask(&daemon, &text).text();
    let own = get(&daemon.url("public-key")).text();
    let own = own.split(':').next().unwrap();
    assert!(!told.contains(&format!("Sig: {own}:")), "a content address does not prove NarSize:\n{told}");
}

/// One way to lie: told the path that is asked for and what an honest peer would say.
type Lie = fn(&str, Vec<u8>) -> Script;

#[test]
fn a_peer_that_lies_costs_itself_and_the_client_gets_the_path_from_an_honest_one() {
    fn change(body: Vec<u8>, key: &str, value: &str) -> Script {
        let text = String::from_utf8(body).unwrap();
        let lines = text.lines().map(|line| {
            if line.starts_with(&format!("{key}: ")) {
                format!("{key}: {value}\n")
            } else {
                format!("{line}\n")
            }
        });
        Script::ok(lines.collect::<String>().into_bytes())
    }
    fn narinfo(path: &str) -> bool {
        path.ends_with(".narinfo")
    }
    // What each is counted as: no lie where it can't be known to be one.
    let (lie, wrong) = ("peernix_peer_lies_total", "peernix_peer_requests_total{outcome=\"wrong\"}");
    let untrusted = "peernix_untrusted_narinfos_total";
    let lies: [(&str, &str, Lie); 10] =
        [
            ("another path", lie, |path, body| {
                if !narinfo(path) {
                    return Script::ok(body);
                }
                let other = format!("/nix/store/{}-payload", "8".repeat(32));
                change(body, "StorePath", &other)
            }),
            ("a bad signature", untrusted, |path, body| {
                if narinfo(path) { change(body, "Sig", "x-1:AAAA") } else { Script::ok(body) }
            }),
            ("another NarHash", untrusted, |path, body| {
                let hash = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
                if narinfo(path) { change(body, "NarHash", hash) } else { Script::ok(body) }
            }),
            ("no narinfo", lie, |path, body| {
                if narinfo(path) { Script::ok(b"<html>".to_vec()) } else { Script::ok(body) }
            }),
            ("an endless narinfo", wrong, |path, body| {
                if narinfo(path) {
                    Script { length: None, ..Script::ok(vec![b'x'; 2 << 20]) }
                } else {
                    Script::ok(body)
                }
            }),
            ("other bytes", lie, |path, mut body| {
                if !narinfo(path) {
                    let middle = body.len() / 2;
                    body[middle] ^= 1;
                }
                Script::ok(body)
            }),
            ("a short NAR", lie, |path, mut body| {
                if !narinfo(path) {
                    body.truncate(body.len() - 8);
                }
                Script::ok(body)
            }),
            ("an endless NAR", lie, |path, mut body| {
                if narinfo(path) {
                    return Script::ok(body);
                }
                body.resize(body.len() + (1 << 20), 0);
                Script { length: None, ..Script::ok(body) }
            }),
            ("thousands of signatures", lie, |path, body| {
                if !narinfo(path) {
                    return Script::ok(body);
                }
                let text = String::from_utf8(body).unwrap();
                let signatures = field(&text, "Sig").unwrap();
                let more = format!("Sig: {signatures}\n").repeat(1000);
                Script::ok(format!("{text}{more}").into_bytes())
            }),
            ("a server error", wrong, |path, body| {
                if narinfo(path) { Script { status: 500, ..Script::ok(body) } } else { Script::ok(body) }
            }),
        ];
    let honest = honest(100_000);
    let upstream = honest.daemon.url("nix-cache");
    let late = Scripted::start(move |path| {
        let truth = get(&format!("{upstream}/{path}"));
        if path.ends_with(".narinfo") {
            // The liar is heard first.
            std::thread::sleep(Duration::from_millis(400));
        }
        Script { status: truth.status, ..Script::ok(truth.bytes()) }
    });
    for (name, cost, lie) in lies {
        let (upstream, part) = (honest.daemon.url("nix-cache"), hash_part(&honest.path).to_owned());
        let liar = Scripted::start(move |path| {
            let truth = get(&format!("{upstream}/{path}"));
            if truth.status != 200 || !path.contains(&part) {
                return Script { status: truth.status, ..Script::ok(truth.bytes()) };
            }
            lie(path, truth.bytes())
        });
        // The liar alone: a 404, never bad bytes as if they were good.
        let settings = "[resolve]\nnarinfo_budget = \"5s\"";
        let (_store, daemon) = relaying(&honest.key, &[liar.url()], settings);
        let told = ask(&daemon, &honest.path);
        if told.status == 200 {
            assert_eq!(get(&daemon.url(&honest.nar_url)).status, 404, "{name}");
        } else {
            assert_eq!(told.status, 404, "{name}");
        }
        assert!(daemon.metric(cost) >= 1.0, "{name}");
        // Beside an honest peer: the path.
        let (_store, daemon) = relaying(&honest.key, &[liar.url(), late.url()], settings);
        assert_eq!(ask(&daemon, &honest.path).status, 200, "{name}");
        assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar, "{name}");
        assert!(daemon.metric(cost) >= 1.0, "{name}");
    }
}

#[test]
fn a_large_nar_of_other_bytes_is_cut_before_its_last_ones() {
    let honest = honest(20 << 20);
    let upstream = honest.daemon.url("nix-cache");
    let liar = Scripted::start(move |path| {
        let mut truth = get(&format!("{upstream}/{path}")).bytes();
        if path.ends_with(".nar") {
            truth[1000] ^= 1;
        }
        Script::ok(truth)
    });
    let (_store, daemon) = relaying(&honest.key, &[liar.url()], "");
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    assert!(get(&daemon.url(&honest.nar_url)).try_bytes().is_err());
    assert_eq!(daemon.metric("peernix_peer_lies_total"), 1.0);
}

#[test]
fn a_silent_peer_costs_no_more_than_the_budget_and_a_stalled_nar_is_cut() {
    let honest = honest(20 << 20);
    let silent = Scripted::start(|_| {
        std::thread::sleep(Duration::from_secs(20));
        Script::ok(Vec::new())
    });
    let (_store, daemon) = relaying(&honest.key, &[silent.url()], "");
    let began = Instant::now();
    assert_eq!(ask(&daemon, &honest.path).status, 404);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // Nothing was remembered of it: with an honest peer the answer comes, silent one or not.
    let (_store, daemon) = relaying(&honest.key, &[silent.url(), honest.daemon.substituter()], "");
    assert_eq!(ask(&daemon, &honest.path).status, 200);

    let (upstream, nar) = (honest.daemon.url("nix-cache"), honest.nar.clone());
    let stalling = Scripted::start(move |path| {
        if path.ends_with(".nar") {
            let half = nar[..nar.len() / 2].to_vec();
            return Script { length: Some(nar.len()), then: Then::Hangs, ..Script::ok(half) };
        }
        Script::ok(get(&format!("{upstream}/{path}")).bytes())
    });
    let (_store, daemon) = relaying(&honest.key, &[stalling.url()], "[resolve]\nstall = \"1s\"");
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    let answer = get(&daemon.url(&honest.nar_url));
    assert_eq!(answer.status, 200);
    assert!(answer.try_bytes().is_err());
}

#[test]
fn a_hundred_clients_make_one_question_and_a_miss_is_remembered() {
    let scripted: Vec<Scripted> = (0..3)
        .map(|_| {
            Scripted::start(|path| {
                std::thread::sleep(Duration::from_millis(60));
                let status = if path == "nix-cache-info" { 200 } else { 404 };
                Script { status, ..Script::ok(b"StoreDir: /nix/store\n".to_vec()) }
            })
        })
        .collect();
    let urls: Vec<String> = scripted.iter().map(Scripted::url).collect();
    // So long that none is silent for it, however busy the machine: a silent one would be asked again.
    let settings = "[resolve]\nnarinfo_budget = \"10s\"";
    let (_store, daemon) = relaying("a-1:oN1zFXrSL7R8wvWrBXE/kcX7g3jYBwSR64LOkoAhVSY=", &urls, settings);
    let missing = format!("/nix/store/{}-x", "3".repeat(32));
    let answered = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                assert_eq!(ask(&daemon, &missing).status, 404);
                answered.fetch_add(1, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(answered.into_inner(), 100);
    let name = format!("{}.narinfo", "3".repeat(32));
    assert_eq!(scripted.iter().map(|peer| peer.asked_for(&name)).collect::<Vec<_>>(), [1, 1, 1]);
    assert_eq!(ask(&daemon, &missing).status, 404);
    assert_eq!(scripted.iter().map(|peer| peer.asked_for(&name)).collect::<Vec<_>>(), [1, 1, 1]);
}

#[test]
fn a_peer_that_speaks_as_peernix_in_go_is_found_asked_and_answered() {
    let store = Store::new();
    let path = store.build(BUILT).remove(0);
    let served = Daemon::serve(store.root(), "");
    let key = get(&served.url("public-key")).text().trim().to_owned();
    // Its narinfo names the NAR as peernix in Go does.
    let (upstream, part) = (served.url("nix-cache"), hash_part(&path).to_owned());
    let http = Scripted::start(move |path| {
        let truth = get(&format!("{upstream}/{path}"));
        let status = truth.status;
        let body = truth.bytes();
        if path.ends_with(".narinfo") && status == 200 {
            let text = String::from_utf8(body).unwrap();
            let lines = text.lines().map(|line| {
                if line.starts_with("URL: ") { format!("URL: {part}.nar\n") } else { format!("{line}\n") }
            });
            return Script::ok(lines.collect::<String>().into_bytes());
        }
        Script { status, ..Script::ok(body) }
    });
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let client_store = Store::new();
    let local = client_store.add_text("local", "text");
    let settings = format!(
        "[discovery]\nport = 0\nmdns = false\ntargets = [\"{}\"]\n[trust]\nhost_keys = false\npublic_keys = [{key:?}]\n",
        udp.local_addr().unwrap()
    );
    let daemon = Daemon::serve(client_store.root(), &settings);

    // Found: it announces itself, and is answered as the old ones answer, which does not go on for ever.
    let mut buffer = [0; 4096];
    let (len, from) = udp.recv_from(&mut buffer).unwrap();
    let announce: serde_json::Value = serde_json::from_slice(&buffer[..len]).unwrap();
    assert_eq!(
        (&announce["cmd"], announce["port"].as_u64()),
        (&"announce".into(), Some(u64::from(daemon.address.port())))
    );
    let ours = serde_json::json!({"cmd": "announce", "peernix_version": "0.3", "nix_version": "2.18",
        "platform": "x86_64-linux", "features": [], "public_key": "go:x", "port": http.address.port()});
    udp.send_to(ours.to_string().as_bytes(), from).unwrap();
    eventually("it is known", || (daemon.metric("peernix_peers") == 1.0).then_some(()));

    // Answered: by the same socket as its announcements.
    let answer = |text: &str| loop {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        socket.send_to(text.as_bytes(), from).unwrap();
        let mut buffer = [0; 4096];
        if let Ok((len, _)) = socket.recv_from(&mut buffer) {
            return String::from_utf8_lossy(&buffer[..len]).into_owned();
        }
    };
    let told = crate::narinfo::narinfo(&daemon, &local);
    let (here, hash) = (hash_part(&local), field(&told, "NarHash").unwrap());
    assert_eq!(answer("ping"), "pong");
    assert_eq!(answer(&format!("has_path?{here}")), "yes");
    assert_eq!(answer(&format!("has_path?{}", "0".repeat(32))), "not_found");
    assert_eq!(answer(&format!("has_path_with_narhash?{here}:{hash}")), "yes");
    let other = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
    assert_eq!(answer(&format!("has_path_with_narhash?{here}:{other}")), "narhash_mismatch");

    // Asked: by datagram first, and by HTTP only after a yes.
    let responder = udp.try_clone().unwrap();
    let part = hash_part(&path).to_owned();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((len, from)) = responder.recv_from(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
            if let Some(hash) = text.strip_prefix("has_path?") {
                let answer: &[u8] = if hash == part { b"yes" } else { b"not_found" };
                responder.send_to(answer, from).unwrap();
            }
        }
    });
    assert_eq!(ask(&daemon, &format!("/nix/store/{}-x", "0".repeat(32))).status, 404);
    assert_eq!(http.asked_for(".narinfo"), 0);
    let told = ask(&daemon, &path).text();
    let nar = get(&daemon.url(&field(&told, "URL").unwrap())).bytes();
    assert_eq!(nar, get(&served.url(&format!("{}.nar", hash_part(&path)))).bytes());

    // Started again: it announces itself from another port, and is asked there.
    let moved = UdpSocket::bind("127.0.0.1:0").unwrap();
    moved.send_to(ours.to_string().as_bytes(), from).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((len, from)) = moved.recv_from(&mut buffer) {
            if buffer[..len].starts_with(b"has_path?") {
                counted.fetch_add(1, Ordering::SeqCst);
                moved.send_to(b"not_found", from).unwrap();
            }
        }
    });
    let mut number = 0;
    eventually("it is asked there", || {
        number += 1;
        assert_eq!(ask(&daemon, &format!("/nix/store/{number:0>32}-x")).status, 404);
        (asked.load(Ordering::SeqCst) > 0).then_some(())
    });
}

#[test]
fn garbage_and_forged_datagrams_change_nothing() {
    let target = UdpSocket::bind("127.0.0.1:0").unwrap();
    target.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let store = Store::new();
    let settings =
        format!("[discovery]\nport = 0\nmdns = false\ntargets = [\"{}\"]\n", target.local_addr().unwrap());
    let daemon = Daemon::serve(store.root(), &settings);
    let mut buffer = [0; 4096];
    let (len, from) = target.recv_from(&mut buffer).unwrap();
    let announce: serde_json::Value = serde_json::from_slice(&buffer[..len]).unwrap();
    // Our own id in somebody else's mouth, noise, questions that are none, and too many.
    let mut forged = announce.clone();
    forged["port"] = 1.into();
    for _ in 0..200 {
        target.send_to(forged.to_string().as_bytes(), from).unwrap();
        for noise in [&b""[..], b"\0\xff\xfe", b"{", b"has_path?x", b"{\"cmd\":\"announce\"}", &[b'x'; 4000]]
        {
            target.send_to(noise, from).unwrap();
        }
    }
    eventually("all of it was read", || {
        let strange = daemon.metric("peernix_discovery_datagrams_received_total{outcome=\"strange\"}");
        (strange > 500.0).then_some(())
    });
    assert_eq!(daemon.metric("peernix_peers"), 0.0);
    assert_eq!(get(&daemon.url("health")).status, 200);
    assert!(!daemon.log().join("\n").contains("panicked"));
}

/// A daemon that found a scripted peer by its announcement, and the socket that the peer announces itself from.
struct Announced {
    daemon: Daemon,
    /// Where the daemon takes datagrams.
    to: SocketAddr,
    socket: UdpSocket,
    _store: Store,
}

const ITS_ID: &str = "0123456789abcdef";

impl Announced {
    fn start(peer: &Scripted, settings: &str) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let store = Store::new();
        let target = socket.local_addr().unwrap();
        let discovery = format!("[discovery]\nport = 0\nmdns = false\ntargets = [\"{target}\"]\n");
        let daemon = Daemon::serve(store.root(), &format!("{discovery}{settings}"));
        let (_, to) = socket.recv_from(&mut [0; 4096]).unwrap();
        let announced = Self { daemon, to, socket, _store: store };
        announced.say(&announced.socket, &announcement(peer.address.port()));
        eventually("it is known", || (announced.daemon.metric("peernix_peers") == 1.0).then_some(()));
        announced
    }

    /// Sends a datagram and waits until it was taken: they are taken in their order.
    fn say(&self, from: &UdpSocket, datagram: &serde_json::Value) {
        let mut buffer = [0; 4096];
        from.send_to(datagram.to_string().as_bytes(), self.to).unwrap();
        from.send_to(b"ping", self.to).unwrap();
        while from.recv_from(&mut buffer).map(|(len, _)| &buffer[..len] != b"pong").unwrap() {}
    }

    /// A socket at another address of this host: a stranger.
    fn stranger() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.2:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        socket
    }
}

fn announcement(port: u16) -> serde_json::Value {
    serde_json::json!({"cmd": "announce", "id": ITS_ID, "features": ["gained"], "port": port})
}

/// A peer that has nothing.
fn empty() -> Scripted {
    Scripted::start(|path| {
        let status = if path == "nix-cache-info" { 200 } else { 404 };
        Script { status, ..Script::ok(b"StoreDir: /nix/store\n".to_vec()) }
    })
}

#[test]
fn nobody_says_goodbye_moves_or_gains_in_the_name_of_another() {
    let (peer, evil) = (empty(), empty());
    let found = Announced::start(&peer, "[cache]\nnegative_ttl = \"1h\"\n");
    let (daemon, stranger) = (&found.daemon, Announced::stranger());
    let goodbye = |id: &str| serde_json::json!({"cmd": "goodbye", "id": id});
    found.say(&found.socket, &goodbye("fedcba9876543210"));
    found.say(&stranger, &goodbye(ITS_ID));
    assert_eq!(daemon.metric("peernix_peers"), 1.0);

    // Its id, told from elsewhere, leads nobody away while it works.
    let missing = format!("/nix/store/{}-x", "4".repeat(32));
    assert_eq!(ask(daemon, &missing).status, 404);
    found.say(&stranger, &announcement(evil.address.port()));
    let told = get(&daemon.url("api/v1/peers")).text();
    assert!(told.contains(&peer.url()) && !told.contains("127.0.0.2"), "{told}");

    // What a stranger gained makes nobody forget a miss.
    let gained = |paths: &[&str]| serde_json::json!({"cmd": "gained", "paths": paths});
    let (part, name) = ("4".repeat(32), format!("{}.narinfo", "4".repeat(32)));
    found.say(&stranger, &gained(&[&part]));
    found.say(&stranger, &gained(&[]));
    assert_eq!(ask(daemon, &missing).status, 404);
    assert_eq!((peer.asked_for(&name), evil.asked_for(".narinfo")), (1, 0));
    // What the peer gained does.
    for (count, paths) in [&[&*part][..], &[], &[]].iter().enumerate() {
        found.say(&found.socket, &gained(paths));
        eventually("it is asked again", || {
            assert_eq!(ask(daemon, &missing).status, 404);
            (peer.asked_for(&name) == count + 2).then_some(())
        });
    }
    found.say(&found.socket, &goodbye(ITS_ID));
    assert_eq!(daemon.metric("peernix_peers"), 0.0);
}

#[test]
fn who_asks_after_news_waits_for_no_older_question() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let peer = Scripted::start(move |path| {
        // The first question hangs until there is another.
        if path.ends_with(".narinfo") && counted.fetch_add(1, Ordering::SeqCst) == 0 {
            eventually("it is asked again", || (counted.load(Ordering::SeqCst) > 1).then_some(()));
        }
        Script { status: 404, ..Script::ok(Vec::new()) }
    });
    let found = Announced::start(&peer, "[resolve]\nnarinfo_budget = \"20s\"\n");
    let (daemon, part) = (&found.daemon, "5".repeat(32));
    let missing = format!("/nix/store/{part}-x");
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(ask(daemon, &missing).status, 404));
        eventually("it is asked", || (asked.load(Ordering::SeqCst) == 1).then_some(()));
        scope.spawn(|| assert_eq!(ask(daemon, &missing).status, 404));
        let joined = "peernix_lookups_joined_total";
        eventually("another joins", || (daemon.metric(joined) == 1.0).then_some(()));
        found.say(&found.socket, &serde_json::json!({"cmd": "gained", "paths": [part]}));
        // The news go through the daemon beside the requests.
        eventually("who asks now begins anew", || {
            scope.spawn(|| assert_eq!(ask(daemon, &missing).status, 404));
            (asked.load(Ordering::SeqCst) > 1).then_some(())
        });
    });
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

#[test]
fn a_pause_and_its_end_are_told_once_each_and_who_was_never_heard_was_never_seen() {
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let state = Arc::clone(&broken);
    let peer = Scripted::start(move |_| {
        let status = if state.load(Ordering::SeqCst) { 500 } else { 404 };
        Script { status, ..Script::ok(Vec::new()) }
    });
    let (_store, daemon) = relaying("a-1:oN1zFXrSL7R8wvWrBXE/kcX7g3jYBwSR64LOkoAhVSY=", &[peer.url()], "");
    let peers = || get(&daemon.url("api/v1/peers")).text();
    assert!(peers().contains("\"last_seen_seconds_ago\": null"), "{}", peers());
    let mut number = 0;
    let mut asked = |times: usize| {
        eventually("it is asked", || {
            number += 1;
            ask(&daemon, &format!("/nix/store/{number:0>32}-x"));
            (peer.asked_for(".narinfo") >= times).then_some(())
        });
    };
    asked(3);
    broken.store(false, Ordering::SeqCst);
    asked(5);
    let told = daemon.logged("a peer failed and is not asked for a while");
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((&told[0]["peer.url"], &told[0]["pause_ms"]), (&peer.url().into(), &500.into()));
    assert_eq!(
        (&told[0]["reason"], &told[0]["level"]),
        (&"it answered with status 500".into(), &"INFO".into())
    );
    let told = eventually("its return is told", || daemon.logged("a peer answers again").pop());
    assert_eq!(told["peer.url"], peer.url());
    assert!(!peers().contains("null,\n    \"successes\""), "{}", peers());
}

#[test]
fn a_cache_with_a_certificate_that_the_system_trusts_is_asked_by_https() {
    let honest = honest(1000);
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("authorities.pem");
    std::fs::write(&file, made.cert.pem()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let (config, upstream) = (Arc::new(config), honest.daemon.url(""));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/nix-cache", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut reader = BufReader::new(rustls::StreamOwned::new(session, socket));
            let mut head = String::new();
            // A client that does not trust the certificate ends here.
            while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head).is_ok_and(|len| len > 0) {}
            let Some(path) = head.split(' ').nth(1) else { continue };
            let answer = get(&format!("{upstream}{}", path.trim_start_matches('/')));
            let (status, body) = (answer.status, answer.bytes());
            let stream = reader.get_mut();
            let _ = write!(
                stream,
                "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(&body);
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    let store = Store::new();
    let serve = |authorities: &std::path::Path| {
        let mut command = std::process::Command::new(crate::support::daemon::PROGRAM);
        command.env("SSL_CERT_FILE", authorities).env_remove("SSL_CERT_DIR");
        let trust = format!("[trust]\npublic_keys = [{:?}]\nhost_keys = false\n", honest.key);
        let settings = "[resolve]\nnarinfo_budget = \"5s\"\n";
        let root = store.root();
        Daemon::start(
            command,
            &format!("[store]\nroot = {root:?}\n{settings}{trust}[[peer]]\nurl = {url:?}\n"),
        )
    };
    let daemon = serve(&file);
    assert_eq!(ask(&daemon, &honest.path).status, 200);
    assert!(get(&daemon.url(&honest.nar_url)).bytes() == honest.nar);

    // A system without any certificates trusts none; all else works.
    std::fs::write(&file, "").unwrap();
    let daemon = serve(&file);
    assert_eq!(ask(&daemon, &honest.path).status, 404);
    let told = || daemon.logged("a peer failed and is not asked for a while").pop();
    let told = eventually("why is told", told);
    assert!(told["reason"].as_str().unwrap().contains("UnknownIssuer"), "{told:?}");
}

#[test]
fn who_answers_under_another_id_is_not_kept_under_the_old_one() {
    let found = Announced::start(&empty(), "");
    let again = honest(1000);
    let before =
        serde_json::json!({"cmd": "announce", "id": "feedfeedfeedfeed", "port": again.daemon.address.port()});
    found.say(&found.socket, &before);
    assert_eq!(found.daemon.metric("peernix_peers"), 2.0);
    assert_eq!(ask(&found.daemon, &again.path).status, 404);
    eventually("it is forgotten", || (found.daemon.metric("peernix_peers") == 1.0).then_some(()));
    let told = get(&found.daemon.url("api/v1/peers")).text();
    assert!(told.contains(ITS_ID) && !told.contains("feedfeedfeedfeed"), "{told}");
}

#[test]
fn silent_newcomers_hold_up_no_question_to_whoever_is_known_to_answer() {
    let peer = empty();
    let found = Announced::start(&peer, "[resolve]\nnarinfo_budget = \"8s\"\n");
    let missing = |digit: &str| format!("/nix/store/{}-x", digit.repeat(32));
    assert_eq!(ask(&found.daemon, &missing("0")).status, 404);
    // Connections to it are made and never answered.
    let silent = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    for number in 1..=40 {
        let socket = UdpSocket::bind(format!("127.0.1.{number}:0")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let id = format!("{number:0>16}");
        found.say(&socket, &serde_json::json!({"cmd": "announce", "id": id, "port": port}));
    }
    assert_eq!(found.daemon.metric("peernix_peers"), 41.0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| ask(&found.daemon, &missing("1")));
        let name = format!("{}.narinfo", "1".repeat(32));
        eventually("it is asked", || (peer.asked_for(&name) == 1).then_some(()));
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    });
}

#[test]
fn made_up_hosts_neither_empty_the_remembered_misses_nor_fill_the_log_without_end() {
    let (peer, made_up) = (empty(), empty());
    let found = Announced::start(&peer, "[cache]\nnegative_ttl = \"1h\"\n");
    let (missing, name) = (format!("/nix/store/{}-x", "7".repeat(32)), format!("{}.narinfo", "7".repeat(32)));
    let began = Instant::now();
    for round in 0..60 {
        let (id, port) = (format!("{round:0>16}"), made_up.address.port());
        found.say(&found.socket, &serde_json::json!({"cmd": "announce", "id": id, "port": port}));
        assert_eq!(ask(&found.daemon, &missing).status, 404);
    }
    let took = began.elapsed().as_secs() as usize;
    assert!(peer.asked_for(&name) <= took + 5, "asked {} times in {took} s", peer.asked_for(&name));
    let told = found.daemon.logged("a peer came");
    assert!(told.len() <= took + 5, "{told:?}");
    assert_eq!(told[0]["from"], peer.address.to_string());
    // The last one is not lost.
    let before = peer.asked_for(&name);
    found.say(
        &found.socket,
        &serde_json::json!({"cmd": "announce", "id": "f".repeat(16), "port": made_up.address.port()}),
    );
    eventually("it is asked again", || {
        assert_eq!(ask(&found.daemon, &missing).status, 404);
        (peer.asked_for(&name) > before).then_some(())
    });
}
