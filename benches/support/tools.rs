//! The programs that a bench runs: better missed before an hour of it than after.

use std::process::{Command, Stdio};

/// Says which are missing, each with the Debian package that has it.
pub(crate) fn are_there(tools: &[(&str, &str)]) -> bool {
    let missing: Vec<_> = tools.iter().filter(|(program, _)| !runs(program)).collect();
    for (program, package) in &missing {
        eprintln!("{program} is missing: apt-get install {package}");
    }
    missing.is_empty()
}

fn runs(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("-v").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok()
}
