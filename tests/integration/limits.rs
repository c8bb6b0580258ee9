//! Limits: what is over them is refused or cut, and the local Nix notices nothing.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use crate::narinfo::hash_part;
use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::host::namespaces;
use crate::support::http::get;
use crate::support::store::Store;
use crate::support::{eventually, succeed};

fn connect(daemon: &Daemon) -> TcpStream {
    let socket = TcpStream::connect(daemon.address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    socket
}

/// Waits for the other side to close, whatever it sends before.
fn is_closed(mut socket: &TcpStream) -> bool {
    let mut rest = Vec::new();
    match socket.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn closed(daemon: &Daemon, reason: &str) -> f64 {
    daemon.metric(&format!("peernix_http_connections_closed_total{{reason=\"{reason}\"}}"))
}

#[test]
fn headers_that_take_too_long_and_connections_that_stand_still_are_cut() {
    let store = Store::new();
    let path = format!("/nix/store/{}-large", "0".repeat(32));
    std::fs::write(store.real(&path), vec![1; 64 << 20]).unwrap();
    store.register(&[crate::support::store::Registration { path: &path, deriver: "", references: &[] }]);
    let daemon = Daemon::serve(store.root(), "[limits]\nheader_time = \"300ms\"\nidle_time = \"600ms\"");

    let mut slow = connect(&daemon);
    slow.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nx-").unwrap();
    assert!(is_closed(&slow));
    assert_eq!(closed(&daemon, "header_time"), 1.0);

    let silent = connect(&daemon);
    assert!(is_closed(&silent));
    assert_eq!(closed(&daemon, "idle_time"), 1.0);

    // Asks for 64 MiB and never reads.
    let mut stuck = connect(&daemon);
    write!(stuck, "GET /{}.nar HTTP/1.1\r\nhost: x\r\n\r\n", "0".repeat(32)).unwrap();
    eventually("the stuck connection is cut", || (closed(&daemon, "idle_time") >= 2.0).then_some(()));
    // One that reads slowly, but reads, gets it all.
    let mut steady = get(&daemon.url(&format!("{}.nar", "0".repeat(32)))).reader();
    let (mut total, mut buffer) = (0, vec![0; 4 << 20]);
    loop {
        match steady.read(&mut buffer).unwrap() {
            0 => break,
            read => total += read,
        }
        if total < 8 << 20 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(total > 64 << 20);
}

#[test]
fn logs_that_are_not_read_keep_nobody_from_nars() {
    let store = Store::new();
    let path = store.add_text("text", "text");
    let log = store.root().join("nix/var/log/nix/drvs/00");
    std::fs::create_dir_all(&log).unwrap();
    std::fs::write(log.join(format!("{}-large.drv", "0".repeat(30))), vec![b'x'; 15 << 20]).unwrap();
    let daemon = Daemon::serve(store.root(), "");
    let mut logs: Vec<TcpStream> = (0..8).map(|_| connect(&daemon)).collect();
    for log in &mut logs {
        write!(log, "GET /log/{}-large.drv HTTP/1.1\r\nhost: x\r\n\r\n", "0".repeat(32)).unwrap();
        // Its first bytes have come, and the rest waits.
        log.read_exact(&mut [0; 15]).unwrap();
    }
    assert_eq!(get(&daemon.url(&format!("{}.nar", hash_part(&path)))).status, 200);
}

#[test]
fn headers_that_are_too_large_are_refused() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "[limits]\nheader_size = \"2 KiB\"");
    let mut socket = connect(&daemon);
    let large = "x".repeat(3000);
    write!(socket, "GET /health HTTP/1.1\r\nhost: x\r\nx-large: {large}\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = socket.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[test]
fn garbage_of_any_kind_ends_its_own_connection_only() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "");
    let kept = get(&daemon.url("health")).status;
    for garbage in [
        &b"\0\0\0\0\0\0\0\0\r\n\r\n"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /%ff%fe\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /nix-cache/nar/x.nar HTTP/1.1\r\nhost: x\r\ncontent-length: 18446744073709551615\r\n\r\nx",
        b"GET / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    ] {
        let mut socket = connect(&daemon);
        socket.write_all(garbage).unwrap();
        let _ = socket.shutdown(std::net::Shutdown::Write);
        assert!(is_closed(&socket));
    }
    let mut put = connect(&daemon);
    put.write_all(b"PUT /x.narinfo HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    put.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: GET, HEAD"), "{answer}");
    assert_eq!((kept, get(&daemon.url("health")).status), (200, 200));
    assert!(daemon.logged("panicked").is_empty());
}

/// A network of its own with more addresses than loopback's, where a daemon sees others than the local Nix.
struct Network {
    outer: std::process::Child,
    inner: u32,
}

impl Network {
    fn new() -> Self {
        let script = "ip link set lo up && ip link add far type veth peer name near && ip link set near up && ip link set far up \
            && ip address add 10.1.0.1/24 dev far && ip address add 10.1.0.2/24 dev far \
            && ip address add 203.0.113.1/24 dev far";
        let (outer, inner) = namespaces(&["--net", "--mount"], script, None);
        Self { outer, inner }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.inner.to_string(), "--net", "--", program]);
        command
    }

    /// Asks from one address at another; gives status, Retry-After and body.
    fn ask(&self, from: &str, to: SocketAddr, count: usize) -> Vec<String> {
        let mut curl = self.command("curl");
        curl.args([
            "--silent",
            "--interface",
            from,
            "-w",
            "%{http_code} %header{retry-after}\n",
            "-o",
            "/dev/null",
        ]);
        curl.args(vec![format!("http://{to}/health"); count]);
        for _ in 1..count {
            curl.args(["-o", "/dev/null"]);
        }
        let output = crate::support::run(&mut curl);
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.trim().to_owned()).collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

#[test]
fn others_than_the_local_nix_are_limited_by_network_rate_and_connections() {
    let (store, network) = (Store::new(), Network::new());
    let settings = format!(
        "[store]\nroot = {:?}\n[limits]\nrequests_per_second = 2\nconnections_per_address = 3\n",
        store.root()
    );
    let mut command = network.command(PROGRAM);
    command.args(["--listen", "0.0.0.0:0"]);
    let daemon = Daemon::start(command, &settings);
    // The first address that it names is the one on all interfaces.
    let port = daemon
        .logged("listening")
        .iter()
        .filter_map(|line| line["address"].as_str()?.strip_prefix("0.0.0.0:")?.parse().ok())
        .next();
    let at = |ip: &str| SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port.unwrap());

    // Loopback has no limit of requests; an address of the LAN has twice the rate in a burst.
    let local = network.ask("127.0.0.1", at("127.0.0.1"), 50);
    assert!(local.iter().all(|line| line == "200"), "{local:?}");
    let lan = network.ask("10.1.0.2", at("10.1.0.1"), 20);
    assert!(lan[..4].iter().all(|line| line == "200"), "{lan:?}");
    let limited: Vec<&String> = lan.iter().filter(|line| line.starts_with("429")).collect();
    assert!(limited.len() >= 10 && limited.iter().all(|line| *line == "429 1"), "{lan:?}");
    // Retry-After is true: after that second the next one is welcome.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(network.ask("10.1.0.2", at("10.1.0.1"), 1), ["200"]);
    // Outside of http.allow there is a status that Nix takes for "not here".
    assert_eq!(network.ask("203.0.113.1", at("203.0.113.1"), 1), ["403"]);

    // Three connections from one address, and no fourth; loopback goes on.
    let hold = format!(
        "import socket,time\ns=[socket.create_connection(('10.1.0.1',{0}),source_address=('10.1.0.2',0)) for _ in range(4)]\nprint(len(s),flush=True)\ntime.sleep(60)",
        port.unwrap()
    );
    let mut python =
        network.command("python3").args(["-c", &hold]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let page = || {
        let curl = network
            .command("curl")
            .args(["--silent", &format!("http://{}/metrics", at("127.0.0.1"))])
            .output();
        String::from_utf8(curl.unwrap().stdout).unwrap()
    };
    eventually("the fourth is refused", || {
        page().contains("peernix_http_connections_closed_total{reason=\"address\"} 1").then_some(())
    });
    succeed(Command::new("kill").arg(python.id().to_string()));
    let _ = python.wait();
    eventually("their places are free again", || {
        page().contains("peernix_http_connections 1\n").then_some(())
    });
}
