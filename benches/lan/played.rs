//! The peers that are played, all in one process of their own in the network of the others.
//!
//! It reads what to do from its input: a path that one of them gains, or to tell how many questions they were asked.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use peernix::nix::StorePathHash;
use peernix::peer::{Announce, FEATURE_HOLDINGS, Message, PathFilter, Told, known_number};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

use crate::network::Network;
use crate::{PEERS, random_hash};

/// That each of them holds.
pub(crate) const PATHS: usize = 20_000;
/// What a peer that has a gained path needs at most before it tells.
const NOTICED: Duration = Duration::from_millis(350);

/// After how long without a question those hang up that do.
const IDLE: Duration = Duration::from_secs(1);

/// What the peers are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Playing {
    /// They tell what they hold.
    Telling,
    /// The same, and they hang up on who does not ask for a while.
    Closing,
    /// They tell nothing.
    Silent,
}

impl Playing {
    const ALL: [Self; 3] = [Self::Telling, Self::Closing, Self::Silent];

    /// As it is written in the arguments.
    pub(crate) fn named(name: &str) -> Self {
        let is_named = |playing: &Self| format!("{playing:?}") == name;
        Self::ALL.into_iter().find(is_named).expect("a way to play")
    }
}

/// Where each of them is.
pub(crate) fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 78, 1, u8::try_from(number + 1).expect("few peers"))
}

/// The process as the bench sees it; killed when dropped.
pub(crate) struct Peers {
    process: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Peers {
    pub(crate) fn start(there: &Network, daemon: SocketAddr, playing: Playing) -> Self {
        let program = std::env::current_exe().expect("this program");
        let mut play = there.command(program.to_str().expect("a plain name"));
        play.args(["--bench", "--play", &daemon.to_string(), &format!("{playing:?}")]);
        let mut process =
            play.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("this program, once more");
        let stdin = process.stdin.take().expect("a pipe");
        let lines = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        Self { process, stdin, lines }
    }

    pub(crate) fn gain(&mut self, number: usize, hash: &StorePathHash) {
        writeln!(self.stdin, "gain {number} {hash}").expect("peers that play");
        assert_eq!(self.line(), "gained");
    }

    /// How many questions and new connections they have had so far.
    pub(crate) fn count(&mut self) -> [f64; 2] {
        writeln!(self.stdin, "count").expect("peers that play");
        let line = self.line();
        let (questions, connections) = line.split_once(' ').expect("two numbers");
        [questions, connections].map(|number| number.parse().expect("a number"))
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("peers that play").expect("a line")
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Plays them until the bench has no more to say.
pub(crate) fn play(daemon: SocketAddr, playing: Playing) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let played: Vec<Arc<Played>> =
        (0..PEERS).map(|number| runtime.block_on(Played::start(number, playing, daemon))).collect();
    let count = |counter: fn(&Played) -> &AtomicUsize| -> usize {
        played.iter().map(|peer| counter(peer).load(Ordering::Relaxed)).sum()
    };
    for line in std::io::stdin().lines().map_while(Result::ok) {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["gain", number, hash] => {
                let hash = StorePathHash::parse(hash.as_bytes()).expect("a hash part");
                played[number.parse::<usize>().expect("a number")].gain(hash);
                println!("gained");
            }
            _ => println!("{} {}", count(|peer| &peer.questions), count(|peer| &peer.connections)),
        }
    }
}

/// A peer that is played.
struct Played {
    playing: Playing,
    instance: u64,
    whole: Told,
    gains: watch::Sender<Vec<StorePathHash>>,
    questions: AtomicUsize,
    connections: AtomicUsize,
}

impl Played {
    async fn start(number: usize, playing: Playing, daemon: SocketAddr) -> Arc<Self> {
        let address = address(number);
        let listener = tokio::net::TcpListener::bind((address, 0)).await.expect("an address of this host");
        let port = listener.local_addr().expect("bound").port();
        let instance = fastrand::u64(..);
        let hashes: Vec<StorePathHash> = (0..PATHS).map(|_| random_hash()).collect();
        let filter = PathFilter::new(&hashes);
        let peer = Arc::new(Self {
            playing,
            instance,
            whole: Told { instance, number: 0, gains: Vec::new(), filter },
            gains: watch::Sender::default(),
            questions: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        });
        let announce = Message::Announce(Announce {
            port,
            id: Some(format!("{instance:016x}")),
            features: if playing == Playing::Silent { Vec::new() } else { vec![FEATURE_HOLDINGS.to_owned()] },
            reply: true,
            ..Announce::default()
        });
        let socket = UdpSocket::bind((address, 0)).expect("an address of this host");
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
                let idle = if self.playing == Playing::Closing { IDLE } else { Duration::MAX };
                match tokio::time::timeout(idle, socket.read(&mut buffer)).await {
                    Ok(Ok(read @ 1..)) => head.extend_from_slice(&buffer[..read]),
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
