//! Logs go to stderr, as text or JSON.

use anyhow::anyhow;
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// The environment variable that goes before `log.filter`.
const VARIABLE: &str = "PEERNIX_LOG";

/// What is logged.
pub(super) fn filter(options: &Log) -> anyhow::Result<EnvFilter> {
    match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => Log::parse_filter(&text).map_err(|why| anyhow!("${VARIABLE}: {why}")),
        _ => Log::parse_filter(&options.filter).map_err(|why| anyhow!("log.filter: {why}")),
    }
}

/// Starts logging. Once a process.
pub(super) fn start(options: &Log) -> anyhow::Result<()> {
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter(options)?)
        .with_writer(std::io::stderr)
        // They would be told on stderr, too: where that is closed, by a panic.
        .log_internal_errors(false)
        .with_target(false);
    match options.format {
        LogFormat::Text => {
            use std::io::IsTerminal as _;
            logs.with_ansi(std::io::stderr().is_terminal()).try_init()
        }
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    }
    .map_err(|error| anyhow!("logging can't be started: {error}"))
}
