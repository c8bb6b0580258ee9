//! What a miss costs on a LAN of 50 hosts with 20,000 paths each: `cargo bench --bench lan`.
//!
//! The real daemon and a client of its host in one network, and peers that are played in another one, each at an address of its
//! own, with a cable between them. They tell what they hold, or don't; and once they hang up soon, as real ones do on who asks
//! less than once in `limits.idle_time`: 100 misses a second with 1 s are like 1.7 a second with 60. Prints the time to a 404, what
//! the daemon's host sends for each miss, whatever it is (the questions, what TCP adds, what goes on by itself meanwhile), and
//! how long after a peer gained a path it is found. A played peer notices its gain as late as a real one may, 250 ms, and
//! gathers for 100. Needs root and iproute2.

#![allow(missing_docs, reason = "a program without an interface")]

#[path = "../support/connection.rs"]
mod connection;
#[path = "../support/figures.rs"]
mod figures;
#[path = "../support/network.rs"]
mod network;
mod played;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/table.rs"]
mod table;
#[path = "../support/tools.rs"]
mod tools;

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use connection::Client;
use network::Network;
use peernix::nix::StorePathHash;
use played::{Peers, Playing};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use support::Daemon;
use table::{Table, Wanted};

pub(crate) const PEERS: usize = 50;
const MISSES: usize = 20_000;
/// From one miss to the next where they are not asked at once: then no question takes TCP's receipt for the last answer along.
const PACE: Duration = Duration::from_millis(10);
const GAINS: usize = 40;
const DAEMON: &str = "10.78.0.1:9999";
/// As long as a peer may leave a question open: what goes on by itself has had its turn in it.
const QUIET: Duration = peernix::peer::HOLDINGS_WAIT;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo bench` passes its own arguments to every bench, and `cargo test` runs them without any.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return ExitCode::SUCCESS;
    }
    if let Some([_, daemon, how]) = arguments.windows(3).find(|words| words[0] == "--play") {
        played::play(daemon.parse().expect("an address"), Playing::named(how));
        return ExitCode::SUCCESS;
    }
    if !tools::are_there(network::TOOLS) {
        return ExitCode::FAILURE;
    }
    let (here, there) = (Network::new(), Network::new());
    connect(&here, &there);
    // What this thread opens and starts from now on is in the network of the daemon.
    let network = File::open(format!("/proc/{}/ns/net", here.pid())).expect("a network");
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).expect("root");

    let mut table = Table::default();
    let mut lan = Lan::start(&there, Playing::Telling);
    let told = lan.metric("peernix_holdings_received_bytes_total") * 8.0;
    let told = told / (PEERS * played::PATHS) as f64;
    table.add("what peers tell of what they hold, bits a path", &[told], Wanted::Anything);
    lan.measure(&mut table, "", MISSES, Duration::ZERO);
    lan.measure(&mut table, ", 100 a second", MISSES / 10, PACE);
    lan.gain(&mut table);
    drop(lan);
    let mut rarely = Lan::start(&there, Playing::Closing);
    rarely.measure(&mut table, ", 100 a second, peers hang up after 1 s", MISSES / 10, PACE);
    drop(rarely);
    let mut silent = Lan::start(&there, Playing::Silent);
    silent.measure(&mut table, ", peers that tell nothing", MISSES / 10, Duration::ZERO);
    table.print();
    ExitCode::SUCCESS
}

/// The daemon's host, and one with all the addresses of the peers, on a cable.
fn connect(here: &Network, there: &Network) {
    here.run(&format!("ip link add eth0 type veth peer name eth0 netns {}", there.pid()));
    here.run("ip address add 10.78.0.1/16 dev eth0 broadcast + && ip link set eth0 up");
    there.run("ip link set eth0 up");
    let addresses: Vec<String> = (0..PEERS)
        .map(|number| format!("ip address add {}/16 dev eth0 broadcast +", played::address(number)))
        .collect();
    there.run(&addresses.join(" && "));
}

pub(crate) fn random_hash() -> StorePathHash {
    StorePathHash::from_bytes(std::array::from_fn(|_| fastrand::u8(..)))
}

/// Packets and bytes that this host has sent, and that it has received.
#[derive(Clone, Copy)]
struct Traffic {
    sent: [f64; 2],
    received: [f64; 2],
}

impl Traffic {
    fn until_now() -> Self {
        // Of this thread's network: the process began in another one.
        let text = std::fs::read_to_string("/proc/thread-self/net/dev").expect("the counters");
        let line = text.lines().find_map(|line| line.trim_start().strip_prefix("eth0:")).expect("eth0");
        let fields: Vec<f64> =
            line.split_whitespace().map(|field| field.parse().expect("a number")).collect();
        Self { sent: [fields[9], fields[8]], received: [fields[1], fields[0]] }
    }

    fn since(self, before: Self) -> Self {
        let difference = |now: [f64; 2], then: [f64; 2]| [now[0] - then[0], now[1] - then[1]];
        Self {
            sent: difference(self.sent, before.sent),
            received: difference(self.received, before.received),
        }
    }
}

struct Lan {
    tell: bool,
    peers: Peers,
    _daemon: Daemon,
    client: Client,
    _folder: tempfile::TempDir,
}

impl Lan {
    /// All of it, as soon as the daemon knows what there is to know.
    fn start(there: &Network, playing: Playing) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let daemon = daemon(folder.path());
        let address: SocketAddr = DAEMON.parse().expect("an address");
        let peers = Peers::start(there, address, playing);
        let client = Client::connect(([127, 0, 0, 1], address.port()).into()).expect("the daemon");
        let tell = playing != Playing::Silent;
        let mut lan = Self { tell, peers, _daemon: daemon, client, _folder: folder };
        lan.until("peernix_peers");
        if tell {
            lan.until("peernix_holdings_known");
        }
        (0..500).for_each(|_| assert_eq!(lan.ask(&random_hash()), 404));
        lan
    }

    /// Waits until a metric has come to the number of peers.
    fn until(&mut self, metric: &str) {
        let began = Instant::now();
        while self.metric(metric) != PEERS as f64 {
            assert!(began.elapsed() < Duration::from_secs(60), "{metric} never comes to {PEERS}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn metric(&mut self, name: &str) -> f64 {
        let answer = self.client.ask("/metrics").expect("the metrics");
        let text = self.client.text(&answer).expect("the metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.expect("a metric of this name").parse().expect("a number")
    }

    fn ask(&mut self, hash: &StorePathHash) -> u16 {
        let answer = self.client.ask(&format!("/nix-cache/{hash}.narinfo")).expect("an answer");
        self.client.discard(&answer).expect("a whole answer");
        answer.status
    }

    fn measure(&mut self, table: &mut Table, what_else: &str, misses: usize, pace: Duration) {
        let quiet = Traffic::until_now();
        std::thread::sleep(QUIET);
        let quiet = Traffic::until_now().since(quiet).sent[0] / QUIET.as_secs_f64();

        let (asked, traffic) = (self.peers.count(), Traffic::until_now());
        let [mut times, mut remembered] = <[Vec<f64>; 2]>::default();
        for _ in 0..misses {
            let hash = random_hash();
            // Once more, when no peer is asked: that is what the machine makes of any answer.
            for times in [&mut times, &mut remembered] {
                let began = Instant::now();
                assert_eq!(self.ask(&hash), 404);
                times.push(began.elapsed().as_secs_f64() * 1e3);
                std::thread::sleep((pace / 2).saturating_sub(began.elapsed()));
            }
        }
        let (traffic, now) = (Traffic::until_now().since(traffic), self.peers.count());
        let [questions, connections] = [now[0] - asked[0], now[1] - asked[1]];
        times.sort_by(f64::total_cmp);
        remembered.sort_by(f64::total_cmp);
        let of_all = misses as f64;
        let wanted = |wanted| if self.tell { wanted } else { Wanted::Anything };
        let mut row =
            |what: &str, value: f64, wanted| table.add(&format!("{what}{what_else}"), &[value], wanted);
        let under_1_ms = wanted(Wanted::Below(1.0));
        for (percent, wanted) in [(50, Wanted::Anything), (90, Wanted::Anything), (99, under_1_ms)] {
            row(&format!("a miss, p{percent}, ms"), times[misses * percent / 100], wanted);
        }
        row("the same asked again, p99, ms", remembered[misses * 99 / 100], Wanted::Anything);
        row("packets sent a miss", traffic.sent[0] / of_all, wanted(Wanted::Below(0.6)));
        row("questions a miss", questions / of_all, Wanted::Anything);
        row("packets sent in all, for each question", traffic.sent[0] / questions, Wanted::Anything);
        row("bytes sent a miss", traffic.sent[1] / of_all, Wanted::Anything);
        row("packets received a miss", traffic.received[0] / of_all, Wanted::Anything);
        row("bytes received a miss", traffic.received[1] / of_all, Wanted::Anything);

        row("new connections for all misses", connections, Wanted::Anything);
        row("packets sent a second while nobody asks", quiet, Wanted::Anything);
    }

    fn gain(&mut self, table: &mut Table) {
        let mut found = Vec::with_capacity(GAINS);
        for number in 0..GAINS {
            let hash = random_hash();
            // It is a remembered miss by now.
            assert_eq!(self.ask(&hash), 404);
            let began = Instant::now();
            self.peers.gain(number % PEERS, &hash);
            while self.ask(&hash) != 200 {
                assert!(began.elapsed() < Duration::from_secs(10), "never found");
                std::thread::sleep(Duration::from_millis(5));
            }
            found.push(began.elapsed().as_secs_f64());
        }
        let longest = found.iter().copied().fold(0.0, f64::max);
        table.add("a gained path is found after, s", &found, Wanted::Anything);
        table.add("the longest of these, s", &[longest], Wanted::AtMost(2.0));
    }
}

fn daemon(folder: &Path) -> Daemon {
    let root = folder.join("root");
    std::fs::create_dir_all(root.join("nix/store")).expect("a store");
    let settings = format!(
        "[discovery]\nmdns = false\n[trust]\nhost_keys = false\nunsigned = \"relay\"\n[store]\nroot = {root:?}\n"
    );
    let program = Command::new(env!("CARGO_BIN_EXE_peernix"));
    Daemon::start(program, folder, "asking", "0.0.0.0:9999", &settings).0
}
