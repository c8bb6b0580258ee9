//! Peers that say what a test tells them to, an honest one, and a daemon that asks them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::daemon::Daemon;
use super::host::Host;
use super::http::{Answer, get};
use super::store::{Registration, Store};
use crate::narinfo::{field, hash_part};

/// What a scripted peer sends.
pub struct Script {
    pub status: u16,
    /// Content-Length.
    pub length: Option<usize>,
    /// Whether each byte is a chunk of its own.
    pub byte_chunks: bool,
    pub body: Vec<u8>,
    /// What it does after the body.
    pub then: Then,
    /// Whether it gives parts of the body to whoever asks for them.
    pub ranges: bool,
    /// How many bytes it sends at most of what it announces.
    pub cut: Option<usize>,
    /// What it sends instead to whoever accepts zstd, as zstd.
    pub zstd: Option<Vec<u8>>,
}

/// What a scripted peer does after the body.
pub enum Then {
    Closes,
    Hangs,
    /// Sends these, a byte now and then.
    Drips(Vec<u8>),
}

impl Script {
    pub fn ok(body: Vec<u8>) -> Self {
        Self {
            status: 200,
            length: Some(body.len()),
            byte_chunks: false,
            body,
            then: Then::Closes,
            ranges: false,
            cut: None,
            zstd: None,
        }
    }
}

/// A scripted peer: what it is asked, and what it says.
pub struct Scripted {
    pub address: SocketAddr,
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    /// `say` gets the path that is asked for, below `/nix-cache/`.
    pub fn start(say: impl Fn(&str) -> Script + Send + Sync + 'static) -> Self {
        Self::start_on(TcpListener::bind("127.0.0.1:0").unwrap(), say)
    }

    /// The same in the network of a host, though it runs outside of it.
    pub fn start_in(
        host: &Host,
        address: &'static str,
        say: impl Fn(&str) -> Script + Send + Sync + 'static,
    ) -> Self {
        let network = std::fs::File::open(format!("/proc/{}/ns/net", host.inner())).unwrap();
        // A socket stays in the network that it was made in, whoever uses it.
        let bind = move || {
            let network_only = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(network.as_fd(), network_only).unwrap();
            TcpListener::bind(address).unwrap()
        };
        Self::start_on(std::thread::spawn(bind).join().unwrap(), say)
    }

    fn start_on(listener: TcpListener, say: impl Fn(&str) -> Script + Send + Sync + 'static) -> Self {
        let (address, asked) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let (say, log) = (Arc::new(say), Arc::clone(&asked));
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let (say, log) = (Arc::clone(&say), Arc::clone(&log));
                std::thread::spawn(move || answer(socket, &*say, &log));
            }
        });
        Self { address, asked }
    }

    pub fn url(&self) -> String {
        format!("http://{}/nix-cache", self.address)
    }

    pub fn asked_for(&self, suffix: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|path| path.ends_with(suffix)).count()
    }
}

fn answer(socket: TcpStream, say: &dyn Fn(&str) -> Script, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(socket.try_clone().unwrap());
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if line == "\r\n" {
            break;
        }
        head.push(line);
    }
    let path = head[0].split(' ').nth(1).unwrap().trim_start_matches("/nix-cache/").to_owned();
    log.lock().unwrap().push(path.clone());
    let mut script = say(&path);
    let range = head.iter().find_map(|line| {
        let line = line.to_lowercase();
        let (from, last) = line.strip_prefix("range: bytes=")?.trim_end().split_once('-')?;
        Some((from.parse::<usize>().ok()?, last.parse::<usize>().ok()))
    });
    let mut part = String::new();
    let accepts_zstd = head.iter().any(|line| line.to_lowercase().trim_end() == "accept-encoding: zstd");
    if let Some(zstd) = script.zstd.take().filter(|_| accepts_zstd) {
        log.lock().unwrap().push(format!("{path} as zstd"));
        (script.length, script.body) = (Some(zstd.len()), zstd);
        part = "content-encoding: zstd\r\n".to_owned();
    }
    if let Some((from, last)) = range.filter(|_| script.ranges) {
        let total = script.body.len();
        let end = last.map_or(total, |last| (last + 1).min(total));
        script.body = script.body[from..end].to_vec();
        (script.status, script.length) = (206, Some(end - from));
        part = format!("content-range: bytes {from}-{}/{total}\r\n", end - 1);
    }
    script.body.truncate(script.cut.unwrap_or(usize::MAX));
    if script.byte_chunks {
        part = "transfer-encoding: chunked\r\n".to_owned();
        let mut chunks = Vec::with_capacity(script.body.len() * 6 + 5);
        script
            .body
            .iter()
            .for_each(|byte| chunks.extend_from_slice(&[b'1', b'\r', b'\n', *byte, b'\r', b'\n']));
        chunks.extend_from_slice(b"0\r\n\r\n");
        (script.body, script.length) = (chunks, None);
    }
    let length = script.length.map_or(String::new(), |length| format!("content-length: {length}\r\n"));
    let mut socket = socket;
    let _ = write!(socket, "HTTP/1.1 {} X\r\nconnection: close\r\n{length}{part}\r\n", script.status);
    let _ = socket.write_all(&script.body);
    match script.then {
        Then::Closes => {}
        Then::Hangs => std::thread::sleep(Duration::from_secs(20)),
        Then::Drips(rest) => {
            for byte in rest {
                if socket.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// An honest host with one built path of `size` bytes, and what it serves.
pub struct Honest {
    pub daemon: Daemon,
    pub path: String,
    pub narinfo: String,
    pub nar_url: String,
    pub nar: Vec<u8>,
    pub key: String,
    pub store: Store,
}

pub fn honest(size: usize) -> Honest {
    let store = Store::new();
    let path = format!("/nix/store/{}-payload", "9".repeat(32));
    let contents: Vec<u8> = (0..size).map(|i| (i * 31 % 251) as u8).collect();
    std::fs::write(store.real(&path), contents).unwrap();
    store.register(&[Registration { path: &path, deriver: "", references: &[] }]);
    let daemon = Daemon::serve(store.root(), "");
    let narinfo = crate::narinfo::narinfo(&daemon, &path);
    let nar_url = field(&narinfo, "URL").unwrap();
    let nar = get(&daemon.url(&nar_url)).bytes();
    let key = get(&daemon.url("public-key")).text().trim().to_owned();
    Honest { daemon, path, narinfo, nar_url, nar, key, store }
}

/// A daemon with an empty store that asks these caches and trusts this key. Whoever names both in this order drops the daemon first.
pub fn relaying(key: &str, urls: &[String], more: &str) -> (Store, Daemon) {
    let store = Store::new();
    let peers: String = urls.iter().map(|url| format!("[[peer]]\nurl = {url:?}\n")).collect();
    let settings = format!("{more}\n[trust]\npublic_keys = [{key:?}]\nhost_keys = false\n{peers}");
    let daemon = Daemon::serve(store.root(), &settings);
    (store, daemon)
}

pub fn ask(daemon: &Daemon, path: &str) -> Answer {
    get(&daemon.url(&format!("nix-cache/{}.narinfo", hash_part(path))))
}
