//! Hosts with networks of their own, for benches that run as root.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

/// What it takes, each with the Debian package that has it.
pub(crate) const TOOLS: &[(&str, &str)] =
    &[("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2")];

/// A network namespace that lives as long as this.
pub(crate) struct Network(Child);

impl Network {
    pub(crate) fn new() -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep infinity"]);
        let mut process = unshare.stdout(Stdio::piped()).spawn().expect("unshare");
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "network namespaces need root");
        Self(process)
    }

    /// The process that holds it, by which `ip` and `nsenter` know it.
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// A program that will run inside.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid().to_string(), "--net", "--", program]);
        command
    }

    /// Lets a shell run this inside.
    pub(crate) fn run(&self, script: &str) {
        let told = self.command("sh").args(["-c", script]).output().expect("nsenter");
        assert!(told.status.success(), "{script}: {}", String::from_utf8_lossy(&told.stderr));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
