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
    folder: tempfile::TempDir,
    nix_daemon: Option<Child>,
}

/// Debian's nobody: as unprivileged as can be.
const NOBODY: &str = "65534";

impl Host {
    /// A host with an empty /nix. `conf` is its nix.conf.
    pub fn new(conf: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests make namespaces: run them as root");
        assert!(Path::new("/nix").is_dir(), "there is no /nix to mount on: tests/run.sh installs nix-bin");
        let folder = tempfile::Builder::new().prefix("peernix-host-").tempdir().unwrap();
        let nix = folder.path().join("nix");
        for part in ["store", "var/nix/daemon-socket", "etc", "home", "nobody"] {
            std::fs::create_dir_all(nix.join(part)).unwrap();
        }
        succeed(Command::new("chmod").args(["a+rx", "--"]).arg(folder.path()));
        succeed(Command::new("chown").arg(NOBODY).arg(nix.join("nobody")));
        let settings = "build-users-group =\nsandbox = false\nexperimental-features = nix-command\n";
        std::fs::write(nix.join("etc/nix.conf"), format!("{settings}{conf}\n")).unwrap();
        let script =
            "mount --bind \"$1\" /nix && mount -t proc proc /proc && echo ready && exec sleep infinity";
        let mut outer = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"])
            .args(["sh", "-c", script, "sh"])
            .arg(&nix)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(outer.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "namespaces can't be made here: these tests need root and CAP_SYS_ADMIN");
        let pid = outer.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        Self { outer, inner: children.trim().parse().unwrap(), folder, nix_daemon: None }
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
        command.args(["--target", &self.inner.to_string(), "--mount", "--pid", "--"]);
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

    /// Builds a Nix expression and gives the paths that it comes to.
    pub fn build(&self, expression: &str) -> Vec<String> {
        std::fs::write(self.nix_folder().join("home/test.nix"), expression).unwrap();
        let mut build = self.command("nix-build");
        build.args(["--no-out-link", "--option", "substitute", "false", "/nix/home/test.nix"]);
        text(&mut build).lines().map(str::to_owned).collect()
    }
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
