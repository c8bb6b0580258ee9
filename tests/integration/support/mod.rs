//! What the tests share: stores, daemons, hosts, HTTP.

pub mod daemon;
pub mod host;
pub mod http;
pub mod lan;
pub mod scripted;
pub mod store;

use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// How long a condition may take to come true; far more than it needs, on a machine that is busy too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` gives something.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a command that has to succeed, and gives its stdout.
pub fn succeed(command: &mut Command) -> Vec<u8> {
    let output = run(command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed with {}: {said}", output.status);
    output.stdout
}

/// The same as text, without the last line end.
pub fn text(command: &mut Command) -> String {
    String::from_utf8(succeed(command)).unwrap().trim_end().to_owned()
}

/// Runs a command to its end, whatever that is.
pub fn run(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; tests/run.sh installs what is needed"))
}
