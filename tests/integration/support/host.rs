//! Hosts: each a mount and process namespace with a /nix of its own, as a machine with Nix has it.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{eventually, succeed, text};

/// A host. Everything in it ends when it is dropped.
pub struct Host {
    /// The process that opened the namespaces; it waits for the first process within.
    outer: Child,
    /// The first process within, as seen from outside.
    inner: u32,
    has_network: bool,
    folder: tempfile::TempDir,
    nix_daemon: Option<Child>,
}

/// Debian's nobody: as unprivileged as can be.
const NOBODY: &str = "65534";

impl Host {
    /// A host with an empty /nix, on the network of this machine. `conf` is its nix.conf.
    pub fn new(conf: &str) -> Self {
        Self::start(conf, false)
    }

    /// The same with a network of its own, which has nothing but loopback yet.
    pub fn with_network(conf: &str) -> Self {
        Self::start(conf, true)
    }

    fn start(conf: &str, has_network: bool) -> Self {
        assert!(Path::new("/nix").is_dir(), "there is no /nix to mount on: tests/run.sh installs nix-bin");
        let folder = tempfile::Builder::new().prefix("peernix-host-").tempdir().unwrap();
        let nix = folder.path().join("nix");
        for part in ["store", "var/nix/daemon-socket", "etc", "home", "nobody"] {
            std::fs::create_dir_all(nix.join(part)).unwrap();
        }
        succeed(Command::new("chmod").args(["a+rx", "--"]).arg(folder.path()));
        succeed(Command::new("chown").arg(NOBODY).arg(nix.join("nobody")));
        let kinds =
            if has_network { &["--mount", "--pid", "--net", "--uts"][..] } else { &["--mount", "--pid"] };
        let (outer, inner) =
            namespaces(kinds, "mount --bind \"$1\" /nix && mount -t proc proc /proc", Some(&nix));
        let host = Self { outer, inner, has_network, folder, nix_daemon: None };
        host.configure(conf);
        host
    }

    /// Writes its nix.conf.
    pub fn configure(&self, conf: &str) {
        let settings = "build-users-group =\nsandbox = false\nexperimental-features = nix-command\n";
        std::fs::write(self.nix_folder().join("etc/nix.conf"), format!("{settings}{conf}\n")).unwrap();
    }

    /// The first process within, as seen from outside.
    pub fn inner(&self) -> u32 {
        self.inner
    }

    /// Where its /nix lies, seen from outside.
    pub fn nix_folder(&self) -> PathBuf {
        self.folder.path().join("nix")
    }

    /// A command within the host, as root.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.enter();
        command.arg(program);
        command.env("HOME", "/nix/home");
        command
    }

    /// A command within the host, as nobody, who has to go through nix-daemon.
    pub fn command_as_nobody(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.enter();
        command.args(["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).arg(program);
        command.env("HOME", "/nix/nobody").env("NIX_REMOTE", "daemon");
        command
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.inner.to_string(), "--mount", "--pid"]);
        command.args(if self.has_network { &["--net", "--uts", "--"][..] } else { &["--"] });
        command.env("NIX_CONF_DIR", "/nix/etc").env_remove("NIX_REMOTE").env_remove("NIX_CONFIG");
        command.env_remove("NIX_PATH").env_remove("XDG_CACHE_HOME");
        command
    }

    /// Puts a program where everybody in the host can run it, and gives its path there.
    pub fn install(&self, program: &str) -> PathBuf {
        let name = Path::new(program).file_name().unwrap();
        let place = self.nix_folder().join(name);
        std::fs::copy(program, &place).unwrap();
        Path::new("/nix").join(name)
    }

    /// Starts its nix-daemon. It ends with the host.
    pub fn start_nix_daemon(&mut self) {
        let mut daemon = self.command("nix-daemon");
        self.nix_daemon = Some(daemon.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let socket = self.nix_folder().join("var/nix/daemon-socket/socket");
        eventually("nix-daemon listens", || socket.exists().then_some(()));
    }

    /// Ends its nix-daemon, and whatever that does for clients.
    pub fn stop_nix_daemon(&mut self) {
        succeed(self.command("pkill").args(["-KILL", "-x", "nix-daemon"]));
        if let Some(mut daemon) = self.nix_daemon.take() {
            let _ = daemon.wait();
        }
    }

    /// Builds a Nix expression and gives the paths that it comes to.
    pub fn build(&self, expression: &str) -> Vec<String> {
        std::fs::write(self.nix_folder().join("home/test.nix"), expression).unwrap();
        let mut build = self.command("nix-build");
        build.args(["--no-out-link", "--option", "substitute", "false", "/nix/home/test.nix"]);
        text(&mut build).lines().map(str::to_owned).collect()
    }
}

/// Opens namespaces, runs a script in them that sets them up, and keeps them open. Gives the process that opened them and
/// the first one within.
pub fn namespaces(kinds: &[&str], script: &str, argument: Option<&Path>) -> (Child, u32) {
    assert!(rustix::process::geteuid().is_root(), "these tests make namespaces: run them as root");
    let mut outer = Command::new("unshare")
        .args(kinds)
        .args(["--fork", "--kill-child", "--propagation", "private", "sh", "-c"])
        .arg(format!("{script} && echo ready && exec sleep infinity"))
        .arg("sh")
        .args(argument)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(outer.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n", "namespaces can't be made here: these tests need root and CAP_SYS_ADMIN");
    let pid = outer.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    (outer, children.trim().parse().unwrap())
}

impl Drop for Host {
    fn drop(&mut self) {
        // --kill-child takes everything within along.
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        if let Some(mut daemon) = self.nix_daemon.take() {
            let _ = daemon.wait();
        }
        // Store paths are read-only; root may remove them all the same.
    }
}
