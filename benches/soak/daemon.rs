//! The real program, and what it takes of the machine.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use crate::LEASE;
use crate::descriptors;
use crate::nix::{self, Store};

/// How often each message was logged, and the first line with it.
type Log = Arc<Mutex<BTreeMap<String, (u64, String)>>>;

/// A daemon on a port of loopback; killed when dropped.
pub(crate) struct Daemon {
    process: Child,
    home: PathBuf,
    configuration: PathBuf,
    port: u16,
    public_key: String,
    log: Log,
}

/// What a process has open, and how large it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) descriptors: u64,
    pub(crate) rss_kib: u64,
    pub(crate) threads: u64,
    pub(crate) children: u64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { descriptors, rss_kib, threads, children } = self;
        let rss = rss_kib / 1024;
        write!(f, "{descriptors} descriptors, {rss} MiB, {threads} threads, {children} children")
    }
}

impl Daemon {
    /// Serves a store, asks these peers, and believes these keys.
    pub(crate) fn start(store: &Store, peers: &[String], keys: &[String]) -> Self {
        let (root, state) = (store.root(), store.folder.join(format!("{}-state", store.name)));
        // Misses are forgotten soon: here nobody tells of what was built since. And little disk, or what was asked for once
        // would never be asked of a peer again.
        let mut settings = format!(
            "[discovery]\nenable = false\n[trust]\nhost_keys = false\npublic_keys = {keys:?}\n\
             [store]\nroot = {root:?}\nlease = \"{}s\"\n[state]\ndirectory = {state:?}\n\
             [cache]\nnegative_ttl = \"1s\"\n[limits]\nspool = \"96 MiB\"\n[log]\nformat = \"json\"\n",
            LEASE.as_secs(),
        );
        settings.extend(peers.iter().map(|url| format!("[[peer]]\nurl = {url:?}\n")));
        let configuration = store.folder.join(format!("{}.toml", store.name));
        fs::write(&configuration, settings).expect("a configuration");
        let (log, port) = (Log::default(), free_port());
        let (process, public_key) = start(&store.folder, &configuration, port, &log);
        let home = store.folder.clone();
        Self { process, home, configuration, port, public_key, log }
    }

    /// As a machine that loses its power.
    pub(crate) fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Comes back where it was.
    pub(crate) fn restart(&mut self) {
        (self.process, self.public_key) = start(&self.home, &self.configuration, self.port, &self.log);
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/nix-cache", self.port)
    }

    pub(crate) fn key(&self) -> String {
        self.public_key.clone()
    }

    /// Its metrics, as text.
    pub(crate) fn metrics(&self) -> String {
        let page = ureq::get(format!("http://127.0.0.1:{}/metrics", self.port)).call();
        page.expect("metrics").into_body().read_to_string().expect("a text")
    }

    /// How often it logged what.
    pub(crate) fn log(&self) -> BTreeMap<String, (u64, String)> {
        self.log.lock().expect("the log").clone()
    }

    /// What it has open, by kind.
    pub(crate) fn descriptors(&self) -> BTreeMap<String, u64> {
        descriptors::of_process(&self.proc_folder())
    }

    fn proc_folder(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.process.id()))
    }

    pub(crate) fn sample(&self) -> Sample {
        let process = self.proc_folder();
        let status = fs::read_to_string(process.join("status")).expect("a daemon that lives");
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name));
            value.and_then(|value| value.split_whitespace().next()?.parse().ok()).expect("a number")
        };
        let tasks = fs::read_dir(process.join("task")).expect("its threads").flatten();
        let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
        Sample {
            descriptors: fs::read_dir(process.join("fd")).expect("its descriptors").count() as u64,
            rss_kib: field("VmRSS:"),
            threads: field("Threads:"),
            children: children.map(|children| children.split_whitespace().count() as u64).sum(),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Below those that the system gives to connections, so that none of these has it while the daemon is away.
fn free_port() -> u16 {
    static NEXT: Mutex<u16> = Mutex::new(20_000);
    let mut next = NEXT.lock().expect("the next port");
    loop {
        *next += 1;
        if TcpListener::bind(("127.0.0.1", *next)).is_ok() {
            return *next;
        }
    }
}

fn start(home: &Path, configuration: &Path, port: u16, log: &Log) -> (Child, String) {
    let mut program = nix::nix(env!("CARGO_BIN_EXE_peernix"), home);
    program.args(["--listen", &format!("127.0.0.1:{port}"), "--config"]).arg(configuration);
    let mut process = program.stderr(Stdio::piped()).spawn().expect("the daemon");
    let lines = BufReader::new(process.stderr.take().expect("its log")).lines().map_while(Result::ok);
    let mut lines = lines.filter_map(|line| serde_json::from_str::<serde_json::Value>(&line).ok());
    let mut told = |message: &str| lines.by_ref().find(|line| line["message"] == message);
    let key = told("listening").and_then(|_| told("started"));
    let key = key.and_then(|line| line["public_key"].as_str().map(str::to_owned));
    let key = key.expect("a daemon that starts");
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        for line in lines {
            let field = |name: &str| line[name].as_str().unwrap_or("").to_owned();
            // With whom and why, where that is said: but not the paths, which are many.
            let parts = ["level", "message", "peer.url", "reason"].map(field);
            let message = parts.join(" ").trim_end().to_owned();
            let mut log = log.lock().expect("the log");
            log.entry(message).or_insert_with(|| (0, line.to_string())).0 += 1;
        }
    });
    (process, key)
}
