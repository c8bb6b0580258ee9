//! `peernix peers`: who is there, asked of the running daemon.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use serde::Deserialize;

#[derive(Deserialize)]
struct Row {
    id: String,
    url: String,
    source: String,
    peernix_version: String,
    known_for_seconds: u64,
    last_seen_seconds_ago: f64,
    failures: u64,
    paused: bool,
    latency_ms: Option<f64>,
    bytes_per_second: Option<f64>,
}

/// Asks the daemon at `url` and prints a table.
pub(super) fn peers(url: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows: Vec<Row> = runtime.block_on(ask(url)).with_context(|| format!("no daemon answers at {url}"))?;
    let mut out = std::io::stdout().lock();
    if rows.is_empty() {
        writeln!(
            out,
            "no peer is known; they are found by themselves on the same LAN, or named by [[peer]]"
        )?;
        return Ok(());
    }
    let head =
        ["PEER", "URL", "FOUND BY", "VERSION", "KNOWN FOR", "SEEN", "ANSWERS IN", "DELIVERS", "FAILED"];
    let mut table = vec![head.map(str::to_owned)];
    table.extend(rows.iter().map(cells));
    let widths: Vec<usize> = (0..head.len())
        .map(|column| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for row in table {
        let padded = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(out, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

fn cells(row: &Row) -> [String; 9] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let version = Some(row.peernix_version.clone()).filter(|version| !version.is_empty());
    [
        row.id.clone(),
        row.url.clone(),
        row.source.clone(),
        or_dash(version),
        humantime::format_duration(Duration::from_secs(row.known_for_seconds)).to_string(),
        format!("{:.0}s ago", row.last_seen_seconds_ago),
        or_dash(row.latency_ms.map(|ms| format!("{ms:.1} ms"))),
        or_dash(row.bytes_per_second.map(|bytes| format!("{:.0} MB/s", bytes / 1e6))),
        format!("{}{}", row.failures, if row.paused { ", paused" } else { "" }),
    ]
}

async fn ask(url: &str) -> anyhow::Result<Vec<Row>> {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build()?;
    let answer = client.get(format!("{}/api/v1/peers", url.trim_end_matches('/'))).send().await?;
    Ok(serde_json::from_slice(&answer.error_for_status()?.bytes().await?)?)
}
