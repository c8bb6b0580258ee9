//! The real program, started on a port that the system chooses, and read by its log.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::eventually;

/// How long a daemon's children are waited for after its end.
const CHILDREN_TIME: Duration = Duration::from_secs(2);

/// A running daemon; killed when dropped.
pub struct Daemon {
    process: Child,
    pub address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    _folder: tempfile::TempDir,
}

/// The program itself.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_peernix");

impl Daemon {
    /// Serves a store below a folder. `settings` is more of the configuration.
    pub fn serve(root: &Path, settings: &str) -> Self {
        Self::start(Command::new(PROGRAM), &format!("[store]\nroot = {root:?}\n{settings}"))
    }

    /// Starts the program that `command` names, with a configuration, on a port of loopback.
    pub fn start(mut command: Command, settings: &str) -> Self {
        command.args(["--listen", "127.0.0.1:0"]);
        Self::start_as_configured(command, settings)
    }

    /// The same, on the addresses that the configuration names, or that it has by default.
    pub fn start_as_configured(mut command: Command, settings: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("peernix-daemon-").tempdir().unwrap();
        let config = folder.path().join("peernix.toml");
        let state = folder.path().join("state");
        std::fs::create_dir(&state).unwrap();
        // Whoever the daemon runs as has to read the one and write the other.
        open_to_all(folder.path());
        open_to_all(&state);
        let mut common = "[log]\nformat = \"json\"\nfilter = \"info,peernix=debug\"\n".to_owned();
        if !settings.contains("[state]") {
            common.push_str(&format!("[state]\ndirectory = {state:?}\n"));
        }
        // Outside of a network of their own, daemons that looked for each other would find the neighbours' too.
        let alone = if settings.contains("[discovery]") { "" } else { "[discovery]\nenable = false\n" };
        std::fs::write(&config, format!("{common}{alone}{settings}\n")).unwrap();
        command.arg("--config").arg(&config);
        command.env_remove("PEERNIX_LOG").stderr(Stdio::piped());
        let mut process = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (stderr, lines) = (process.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        let mut daemon = Self { process, address: ([127, 0, 0, 1], 0).into(), log, _folder: folder };
        daemon.address = eventually("the daemon listens", || {
            assert!(daemon.process.try_wait().unwrap().is_none(), "it ended: {:#?}", daemon.log());
            let line = daemon.logged("listening").into_iter().next()?;
            line["address"].as_str()?.parse().ok()
        });
        daemon
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.address)
    }

    /// The URL that nix.conf names.
    pub fn substituter(&self) -> String {
        self.url("nix-cache")
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// All that it logged so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// The lines with this message.
    pub fn logged(&self, message: &str) -> Vec<serde_json::Value> {
        let parse = |line: &String| serde_json::from_str::<serde_json::Value>(line).ok();
        let lines = self.log();
        lines.iter().filter_map(parse).filter(|line| line["message"] == message).collect()
    }

    /// Its `nix-store` processes.
    pub fn children(&self) -> Vec<u32> {
        let mut found = Vec::new();
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten() {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok())
                    .filter(|pid| serves(*pid)),
            );
        }
        found
    }

    /// The value of a metric without labels, or with exactly these.
    pub fn metric(&self, name: &str) -> f64 {
        let page = super::http::get(&self.url("metrics")).text();
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in:\n{page}")).parse().unwrap()
    }

    pub fn signal(&self, signal: &str) {
        super::succeed(Command::new("kill").args([signal, &self.pid().to_string()]));
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the daemon ends", || self.ended())
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().unwrap()
    }
}

/// Other children come and go: `nix show-config`, `nix-store --version`.
fn serves(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split(|b| *b == 0).any(|arg| arg == b"--serve"))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let has_ended = !matches!(self.process.try_wait(), Ok(None));
        let children = if has_ended { Vec::new() } else { self.children() };
        let _ = self.process.kill();
        let _ = self.process.wait();
        // They end by themselves, and one that has just been started would make the folder of its store again.
        let until = Instant::now() + CHILDREN_TIME;
        while children.iter().any(|child| serves(*child)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log().join("\n"));
        }
    }
}

fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o777)).unwrap();
}
