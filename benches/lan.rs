//! What a miss costs on a LAN of 50 hosts with 20,000 paths each: `cargo bench --bench lan`.
//!
//! The real daemon on loopback, and peers that are played here, each at an address of its own. Once they tell what they
//! hold, once they don't. Prints the time to a 404 and the questions that the daemon sent for each, and how long after a
//! peer gained a path it is found. A played peer notices its gain as late as a real one may, 250 ms, and gathers for 100.

#![allow(missing_docs, reason = "a program without an interface")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use peernix::nix::StorePathHash;
use peernix::peer::{Announce, FEATURE_HOLDINGS, Message, PathFilter, Told, known_number};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

const PEERS: usize = 50;
const PATHS: usize = 20_000;
const MISSES: usize = 20_000;
const GAINS: usize = 20;
/// What a peer that has a gained path needs at most before it tells.
const NOTICED: Duration = Duration::from_millis(350);

fn main() {
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    for (what, tells, misses) in
        [("peers that tell nothing", false, MISSES / 10), ("peers that tell", true, MISSES)]
    {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let daemon = Daemon::start(folder.path());
        let played: Vec<Arc<Played>> =
            (0..PEERS).map(|number| runtime.block_on(Played::start(number, tells, daemon.udp))).collect();
        daemon.until("peernix_peers", PEERS);
        if tells {
            daemon.until("peernix_holdings_known", PEERS);
        }
        let mut client = Client::new(daemon.address);
        (0..500).for_each(|_| assert_eq!(client.ask(&random_hash()), 404));
        let count = |counter: fn(&Played) -> &AtomicUsize| -> usize {
            played.iter().map(|peer| counter(peer).load(Ordering::Relaxed)).sum()
        };
        let (questions, connections) = (count(|peer| &peer.questions), count(|peer| &peer.connections));
        let mut times = Vec::with_capacity(misses);
        for _ in 0..misses {
            let hash = random_hash();
            let began = Instant::now();
            assert_eq!(client.ask(&hash), 404);
            times.push(began.elapsed());
        }
        let questions = count(|peer| &peer.questions) - questions;
        let connections = count(|peer| &peer.connections) - connections;
        times.sort();
        let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e3;
        println!(
            "{what}: {misses} misses: 404 after {:.3} ms at the median, {:.3} ms at p90, {:.3} ms at p99; \
             {:.3} questions a miss, {connections} new connections",
            at(50),
            at(90),
            at(99),
            questions as f64 / misses as f64,
        );
        if !tells {
            continue;
        }
        let mut found = Vec::with_capacity(GAINS);
        for number in 0..GAINS {
            let hash = random_hash();
            // It is a remembered miss by now.
            assert_eq!(client.ask(&hash), 404);
            let began = Instant::now();
            played[number % PEERS].gain(hash);
            while client.ask(&hash) != 200 {
                assert!(began.elapsed() < Duration::from_secs(10), "never found");
                std::thread::sleep(Duration::from_millis(5));
            }
            found.push(began.elapsed());
        }
        found.sort();
        println!(
            "a gained path is found after {:.0} ms at the median, {:.0} ms at most",
            found[GAINS / 2].as_secs_f64() * 1e3,
            found[GAINS - 1].as_secs_f64() * 1e3
        );
    }
}

fn random_hash() -> StorePathHash {
    StorePathHash::from_bytes(std::array::from_fn(|_| fastrand::u8(..)))
}

/// A peer that is played.
struct Played {
    instance: u64,
    whole: Told,
    gains: watch::Sender<Vec<StorePathHash>>,
    questions: AtomicUsize,
    connections: AtomicUsize,
}

impl Played {
    async fn start(number: usize, tells: bool, daemon: SocketAddr) -> Arc<Self> {
        let address = std::net::Ipv4Addr::new(127, 0, 1, u8::try_from(number + 1).expect("few peers"));
        let listener = tokio::net::TcpListener::bind((address, 0)).await.expect("an address of loopback");
        let port = listener.local_addr().expect("bound").port();
        let instance = fastrand::u64(..);
        let hashes: Vec<StorePathHash> = (0..PATHS).map(|_| random_hash()).collect();
        let filter = PathFilter::new(&hashes);
        let peer = Arc::new(Self {
            instance,
            whole: Told { instance, number: 0, gains: Vec::new(), filter },
            gains: watch::Sender::default(),
            questions: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        });
        let announce = Message::Announce(Announce {
            port,
            id: Some(format!("{instance:016x}")),
            features: if tells { vec![FEATURE_HOLDINGS.to_owned()] } else { Vec::new() },
            reply: true,
            ..Announce::default()
        });
        let socket = UdpSocket::bind((address, 0)).expect("an address of loopback");
        tokio::spawn(async move {
            loop {
                let _ = socket.send_to(&announce.to_datagram(), daemon);
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        });
        let serving = Arc::clone(&peer);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                serving.connections.fetch_add(1, Ordering::Relaxed);
                let _ = socket.set_nodelay(true);
                tokio::spawn(Arc::clone(&serving).serve(socket));
            }
        });
        peer
    }

    fn gain(self: &Arc<Self>, hash: StorePathHash) {
        self.gains.send_modify(|gains| gains.push(hash));
    }

    async fn serve(self: Arc<Self>, mut socket: tokio::net::TcpStream) {
        let (mut head, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            while !head.ends_with(b"\r\n\r\n") {
                match socket.read(&mut buffer).await {
                    Ok(read @ 1..) => head.extend_from_slice(&buffer[..read]),
                    _ => return,
                }
            }
            let text = String::from_utf8_lossy(&head);
            let path = text.split(' ').nth(1).unwrap_or_default().to_owned();
            let (status, body) = self.answer(path.trim_start_matches("/nix-cache/")).await;
            head.clear();
            let mut answer =
                format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
            answer.extend_from_slice(&body);
            if socket.write_all(&answer).await.is_err() {
                return;
            }
        }
    }

    async fn answer(&self, path: &str) -> (u16, Vec<u8>) {
        if let Some(query) = path.strip_prefix("api/v1/holdings") {
            let known = query.strip_prefix("?since=").and_then(|known| known_number(known, self.instance));
            let Some(known) = known.and_then(|known| usize::try_from(known).ok()) else {
                return (200, self.whole.to_bytes().expect("a message").to_vec());
            };
            let mut gains = self.gains.subscribe();
            let more = gains.wait_for(|gains| gains.len() > known);
            if tokio::time::timeout(Duration::from_secs(20), more).await.is_err() {
                return (304, Vec::new());
            }
            tokio::time::sleep(NOTICED).await;
            let gains = self.gains.borrow()[known..].to_vec();
            let number = (known + gains.len()) as u64;
            let told = Told { instance: self.instance, number, gains, filter: None };
            return (200, told.to_bytes().expect("a message").to_vec());
        }
        let Some(hash) = path.strip_suffix(".narinfo") else {
            return (200, b"StoreDir: /nix/store\n".to_vec());
        };
        self.questions.fetch_add(1, Ordering::Relaxed);
        if !self.gains.borrow().iter().any(|gained| gained.to_string() == hash) {
            return (404, Vec::new());
        }
        let nar_hash = "0".repeat(52);
        let narinfo = format!(
            "StorePath: /nix/store/{hash}-gained\nURL: nar/{hash}-{nar_hash}.nar\nCompression: none\n\
             NarHash: sha256:{nar_hash}\nNarSize: 120\nReferences: \n"
        );
        (200, narinfo.into_bytes())
    }
}

/// A client with one connection, as the Nix of this host.
struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    fn new(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).expect("the daemon");
        socket.set_nodelay(true).expect("a socket");
        Self { reader: BufReader::new(socket) }
    }

    fn ask(&mut self, hash: &StorePathHash) -> u16 {
        self.get(&format!("/nix-cache/{hash}.narinfo")).0
    }

    fn get(&mut self, path: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        self.reader.get_mut().write_all(request.as_bytes()).expect("the daemon");
        let (mut status, mut len) = (0, 0);
        for line in self.reader.by_ref().lines().map_while(Result::ok) {
            if let Some(rest) = line.strip_prefix("HTTP/1.1 ") {
                status = rest[..3].parse().expect("a status");
            } else if let Some(rest) = line.strip_prefix("content-length: ") {
                len = rest.parse().expect("a length");
            } else if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; len];
        self.reader.read_exact(&mut body).expect("a body");
        (status, String::from_utf8_lossy(&body).into_owned())
    }
}

/// The real program on a port of loopback; killed when dropped.
struct Daemon {
    process: Child,
    address: SocketAddr,
    udp: SocketAddr,
}

impl Daemon {
    fn start(folder: &Path) -> Self {
        let (root, state) = (folder.join("root"), folder.join("state"));
        std::fs::create_dir_all(root.join("nix/store")).expect("a store");
        let udp = UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
        let settings = format!(
            "[discovery]\nmdns = false\nport = {}\n[trust]\nhost_keys = false\nunsigned = \"relay\"\n\
             [store]\nroot = {root:?}\n[state]\ndirectory = {state:?}\n[log]\nformat = \"json\"\n",
            udp.port()
        );
        let file = folder.join("peernix.toml");
        std::fs::write(&file, settings).expect("a configuration");
        let mut program = Command::new(env!("CARGO_BIN_EXE_peernix"));
        program.args(["--listen", "127.0.0.1:0", "--config"]).arg(&file).stderr(Stdio::piped());
        let mut process = program.spawn().expect("the daemon");
        let mut lines = BufReader::new(process.stderr.take().expect("its log")).lines().map_while(Result::ok);
        let address = lines
            .by_ref()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(&line).ok())
            .find(|line| line["message"] == "listening")
            .and_then(|line| line["address"].as_str()?.parse().ok())
            .expect("a daemon that starts");
        // Whoever stops reading would stop the daemon.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, address, udp }
    }

    /// Waits until a metric has come to this.
    fn until(&self, metric: &str, value: usize) {
        let (mut client, began) = (Client::new(self.address), Instant::now());
        let line = format!("{metric} {value}");
        while !client.get("/metrics").1.lines().any(|told| told == line) {
            assert!(began.elapsed() < Duration::from_secs(60), "{line} is never told");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
