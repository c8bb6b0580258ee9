//! Who is asked: the daemon, and nginx with files.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::connection::Client;
use crate::memory::read_from_disk;
use crate::store::Store;
use crate::unit::environment;

/// /proc counts CPU time in hundredths of a second, on every Linux.
const TICKS: f64 = 100.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Peernix,
    Nginx,
}

/// A server that runs; ended when dropped.
pub(crate) struct Server {
    pub(crate) kind: Kind,
    pub(crate) address: SocketAddr,
    process: Child,
    /// From the start of its process to the first narinfo.
    pub(crate) first_answer: Duration,
}

impl Server {
    pub(crate) fn start(kind: Kind, store: &Store) -> Self {
        let folder = &store.folder;
        let address = free_address();
        let log = folder.join(format!("{kind:?}.log"));
        let mut program = match kind {
            Kind::Peernix => peernix(store, address),
            Kind::Nginx => nginx(folder, address),
        };
        program.envs(environment()).stderr(File::create(&log).expect("a log"));
        let wanted = format!("/{}.narinfo", store.large);
        let began = Instant::now();
        let process = program.spawn().expect("a server");
        let mut server = Self { kind, address, process, first_answer: Duration::ZERO };
        let answers = || {
            let mut client = Client::connect(address).ok()?;
            (client.ask(&wanted).ok()?.status == 200).then_some(())
        };
        while answers().is_none() {
            let ended = server.process.try_wait().expect("a process").is_some();
            if ended || began.elapsed() > Duration::from_secs(10) {
                panic!("{kind:?} does not answer: {}", fs::read_to_string(&log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        server.first_answer = began.elapsed();
        server
    }

    /// CPU time until now, in seconds.
    pub(crate) fn cpu(&self) -> f64 {
        let ticks = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its CPU time");
            // The program's name stands in brackets, and may hold anything.
            let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
            fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("ticks")).sum::<f64>()
        };
        self.processes().into_iter().map(ticks).sum::<f64>() / TICKS
    }

    /// What it has read from the disk until now, in bytes.
    pub(crate) fn read_from_disk(&self) -> u64 {
        self.processes().into_iter().map(|pid| read_from_disk(&pid.to_string())).sum()
    }

    /// Resident memory now (`VmRSS`) or at most until now (`VmHWM`), in MB.
    pub(crate) fn memory(&self, field: &str) -> f64 {
        let kib = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its memory");
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok()).expect("kB")
        };
        self.processes().into_iter().map(kib).sum::<f64>() * 1024.0 / 1e6
    }

    /// Those that do the work: the daemon, or nginx's workers.
    fn processes(&self) -> Vec<u32> {
        let pid = self.process.id();
        if self.kind == Kind::Peernix {
            return vec![pid];
        }
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("its workers");
        children.split_whitespace().map(|pid| pid.parse().expect("a process")).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            // Not SIGKILL: nginx's workers would outlive it.
            let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

fn peernix(store: &Store, address: SocketAddr) -> Command {
    let state = store.folder.join("state");
    let settings = format!(
        "[discovery]\nenable = false\n[trust]\nhost_keys = false\n[signing]\nkeys = [{:?}]\n[store]\nroot = {:?}\n\
         [state]\ndirectory = {state:?}\n",
        store.secret_key, store.root
    );
    let file = store.folder.join("peernix.toml");
    fs::write(&file, settings).expect("a configuration");
    let mut program = Command::new(env!("CARGO_BIN_EXE_peernix"));
    program.args(["--listen", &address.to_string(), "--config"]).arg(&file);
    program
}

/// nginx as one would set it up for a cache of files, and nothing of it outside the folder.
fn nginx(folder: &Path, address: SocketAddr) -> Command {
    // Without this its workers would be somebody who can't look into the folder.
    let user = if rustix::process::geteuid().is_root() { "user root root;" } else { "" };
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|what| format!("{what}_temp_path {:?};", folder.join(format!("nginx-{what}"))))
        .join(" ");
    let settings = format!(
        "{user} daemon off; worker_processes auto; pid {:?}; error_log stderr crit;\n\
         events {{ worker_connections 1024; }}\n\
         http {{ sendfile on; access_log off; log_not_found off; keepalive_requests 1000000000; {temporary}\n\
         server {{ listen {address}; root {:?}; }} }}\n",
        folder.join("nginx.pid"),
        folder.join("cache"),
    );
    let file = folder.join("nginx.conf");
    fs::write(&file, settings).expect("a configuration");
    let mut program = Command::new("nginx");
    program.args(["-e", "stderr", "-p"]).arg(folder).arg("-c").arg(&file);
    program
}

/// A port that nobody has now. Not the system's choice at listening: the time to the first answer counts from the start.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}
