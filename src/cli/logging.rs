//! Logs go to stderr, as text or JSON.

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// The environment variable that goes before `log.filter`.
const VARIABLE: &str = "PEERNIX_LOG";

/// What is logged.
pub(super) fn filter(options: &Log) -> anyhow::Result<EnvFilter> {
    match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(&text).with_context(|| format!("{VARIABLE}={text} is no filter"))
        }
        _ => EnvFilter::try_new(&options.filter)
            .with_context(|| format!("log.filter = {:?} is no filter", options.filter)),
    }
}

/// Starts logging. Once a process.
pub(super) fn start(options: &Log) -> anyhow::Result<()> {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter(options)?)
        .with_writer(std::io::stderr)
        .with_target(false);
    match options.format {
        LogFormat::Text => {
            use std::io::IsTerminal as _;
            logs.with_ansi(std::io::stderr().is_terminal()).try_init()
        }
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    }
    .map_err(|error| anyhow::anyhow!("logging can't be started: {error}"))
}
