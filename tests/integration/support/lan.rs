//! A LAN: a bridge in a network namespace of its own, and hosts on it.

use std::process::{Child, Command, Stdio};

use super::host::{Host, namespaces};
use super::{succeed, text};

/// A bridge; hosts hang on it by a cable each.
pub struct Lan {
    outer: Child,
    inner: u32,
}

impl Lan {
    pub fn new() -> Self {
        let script =
            "ip link set lo up && ip link add br0 type bridge mcast_snooping 0 && ip link set br0 up";
        let (outer, inner) = namespaces(&["--net", "--mount"], script, None);
        Self { outer, inner }
    }

    /// A host with 10.77.0.`number` on this LAN.
    pub fn host(&self, number: u8, conf: &str) -> Host {
        let host = Host::with_network(conf);
        let (inside, cable) = (host.inner().to_string(), format!("cable{number}"));
        let peer = ["peer", "name", "eth0", "netns", &inside];
        succeed(self.ip().args(["link", "add", &cable, "type", "veth"]).args(peer));
        succeed(self.ip().args(["link", "set", &cable, "master", "br0", "up"]));
        let address = format!("10.77.0.{number}/24");
        for arguments in [
            &["link", "set", "lo", "up"][..],
            &["address", "add", &address, "broadcast", "+", "dev", "eth0"],
            &["link", "set", "eth0", "up"],
        ] {
            succeed(host.command("ip").args(arguments));
        }
        host
    }

    /// Pulls a host's cable, or puts it back.
    pub fn cable(&self, number: u8, state: &str) {
        succeed(self.ip().args(["link", "set", &format!("cable{number}"), state]));
    }

    fn ip(&self) -> Command {
        self.enter("ip")
    }

    fn enter(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.inner.to_string(), "--net", "--", program]);
        command
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

/// Drops everything that comes to a host or leaves it, without a word to anybody.
pub fn swallow(host: &Host) {
    let rules = "table inet t {
        chain i { type filter hook input priority 0; iifname eth0 drop; }
        chain o { type filter hook output priority 0; oifname eth0 drop; }
    }";
    let mut nft = host.command("nft");
    let mut nft =
        nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft; tests/run.sh installs nftables");
    std::io::Write::write_all(&mut nft.stdin.take().unwrap(), rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
}

/// Lets it through again.
pub fn let_through(host: &Host) {
    succeed(host.command("nft").args(["flush", "ruleset"]));
}

/// Sends a signal to the host's daemon itself: what started it stands outside of the host.
pub fn signal(host: &Host, signal: &str) {
    succeed(host.command("pkill").args([signal, "-x", "peernix"]));
}

/// Asks the host's own daemon, from within; gives status and body.
pub fn ask(host: &Host, path: &str) -> (u16, String) {
    let mut curl = host.command("curl");
    curl.args(["--silent", "--max-time", "20", "-w", "\n%{http_code}"])
        .arg(format!("http://127.0.0.1:9999/{path}"));
    let answer = String::from_utf8(super::run(&mut curl).stdout).unwrap();
    let (body, status) = answer.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

/// A metric of the host's own daemon.
pub fn metric(host: &Host, name: &str) -> f64 {
    let (_, page) = ask(host, "metrics");
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

/// The public key of the host's daemon.
pub fn key(host: &Host) -> String {
    ask(host, "public-key").1.trim().to_owned()
}

/// Everything that Nix has of a path, itself included.
pub fn requisites(host: &Host, path: &str) -> Vec<String> {
    let told = text(host.command("nix-store").args(["--query", "--requisites", path]));
    told.lines().map(str::to_owned).collect()
}
