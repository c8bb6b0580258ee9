//! The daemon as benches start it: the real program, known by what its log says of it.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub(crate) mod unit;

/// Killed when dropped.
pub(crate) struct Daemon(pub(crate) Child);

impl Daemon {
    /// Starts `program` with these settings, and a state folder of its own in `folder`. It looks for nobody by itself, unless they say
    /// how. With it: the address that it listens on, and the key that it signs with, as Nix writes it.
    pub(crate) fn start(
        mut program: Command,
        folder: &Path,
        name: &str,
        listen: &str,
        settings: &str,
    ) -> (Self, String, String) {
        let state = folder.join(format!("{name}-state"));
        let alone = if settings.contains("[discovery]") { "" } else { "[discovery]\nenable = false\n" };
        let settings = format!("{alone}[state]\ndirectory = {state:?}\n[log]\nformat = \"json\"\n{settings}");
        let file = folder.join(format!("{name}.toml"));
        std::fs::write(&file, settings).expect("a configuration");
        program.args(["--listen", listen, "--config"]).arg(&file).stderr(Stdio::piped());
        let mut process = program.envs(unit::environment()).spawn().expect("the daemon");
        let mut lines = BufReader::new(process.stderr.take().expect("its log")).lines().map_while(Result::ok);
        let mut told = |message: &str, field: &str| {
            let line = lines
                .by_ref()
                .filter_map(|line| serde_json::from_str::<serde_json::Value>(&line).ok())
                .find(|line| line["message"] == message)
                .expect("a daemon that starts");
            line[field].as_str().expect("a text").to_owned()
        };
        let address = told("listening", "address");
        let public_key = told("started", "public_key");
        // Whoever stops reading would stop the daemon.
        std::thread::spawn(move || lines.for_each(drop));
        (Self(process), address, public_key)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
