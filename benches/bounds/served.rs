//! A daemon with its memory, and the connections that ask it.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::connection::Client;
use crate::store::{Store, StorePath};
use crate::support::Daemon;
use crate::support::unit::environment;

const PROGRAM: &str = env!("CARGO_BIN_EXE_peernix");
/// In which a daemon has read all names.
const READ_TIME: Duration = Duration::from_millis(500);
const KIB_A_MB: f64 = 1e6 / 1024.0;

/// A daemon that serves a store, and relays from another one if it knows one.
pub(crate) struct Served {
    daemon: Daemon,
    pub(crate) address: SocketAddr,
    public_key: String,
}

impl Served {
    pub(crate) fn start(folder: &Path, name: &str, store: &Store, other: Option<&Self>) -> Self {
        let root = &store.root;
        let keys = other.map(|other| format!("{:?}", other.public_key)).unwrap_or_default();
        let mut settings =
            format!("[store]\nroot = {root:?}\n[trust]\nhost_keys = false\npublic_keys = [{keys}]\n");
        let url = |other: &Self| format!("[[peer]]\nurl = \"http://{}/nix-cache\"\n", other.address);
        settings.extend(other.map(url));
        let program = Command::new(PROGRAM);
        let (daemon, address, public_key) = Daemon::start(program, folder, name, "127.0.0.1:0", &settings);
        Self { daemon, address: address.parse().expect("an address"), public_key }
    }

    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address).expect("a connection")
    }

    /// Resident memory now (`VmRSS`) or at most until now (`VmHWM`), in KiB.
    pub(crate) fn kib(&self, field: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.daemon.0.id())).expect("its memory");
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).expect("kB")
    }

    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.daemon.0.id())).map_or(0, Iterator::count)
    }

    pub(crate) fn mb(&self, field: &str) -> f64 {
        self.kib(field) / KIB_A_MB
    }
}

/// Asks for a narinfo, and gives where the NAR is.
pub(crate) fn nar_of(client: &mut Client, path: &StorePath) -> String {
    let answer = client.ask(&path.url()).expect("an answer");
    let text = client.text(&answer).expect("a narinfo");
    let url = text.lines().find_map(|line| line.strip_prefix("URL: "));
    format!("/nix-cache/{}", url.unwrap_or_else(|| panic!("{} for {}: {text}", answer.status, path.url())))
}

/// From the start of a daemon's process to its first narinfo, in ms. Its state lies in this folder, and it is ended as by systemd.
pub(crate) fn first_answer(folder: &Path, state: &Path, store: &Store, path: &StorePath) -> f64 {
    let address = free_address();
    let settings = format!(
        "[discovery]\nenable = false\n[trust]\nhost_keys = false\n[store]\nroot = {:?}\n[state]\ndirectory = {state:?}\n",
        store.root,
    );
    let file = folder.join("first.toml");
    fs::write(&file, settings).expect("a configuration");
    let mut program = Command::new(PROGRAM);
    program.envs(environment()).args(["--listen", &address.to_string(), "--config"]).arg(&file);
    program.stderr(Stdio::null());
    let began = Instant::now();
    let mut process = program.spawn().expect("the daemon");
    let answers = || {
        let mut client = Client::connect(address).ok()?;
        (client.ask(&path.url()).ok()?.status == 200).then_some(())
    };
    while answers().is_none() {
        assert!(began.elapsed() < Duration::from_secs(10), "it never answers");
        std::thread::sleep(Duration::from_micros(200));
    }
    let took = began.elapsed();
    // What was not read yet is not remembered.
    std::thread::sleep(READ_TIME);
    kill_process(Pid::from_child(&process), Signal::TERM).expect("a process");
    assert!(process.wait().expect("its end").success());
    let names = fs::read_to_string(state.join("names")).expect("what is remembered");
    let there = fs::read_dir(store.directory()).expect("a store").flatten();
    assert_eq!(names.lines().count(), there.filter(|entry| entry.file_name().len() > 32).count());
    took.as_secs_f64() * 1e3
}

/// A port that nobody has now. Not the system's choice at listening: the time counts from the start.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port")
}
