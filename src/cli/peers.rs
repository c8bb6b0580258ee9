//! `peernix peers`: who is there, asked of the running daemon.

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use serde::Deserialize;

/// How long the daemon may take.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// What is said when there is nobody to show.
const NOBODY: &str = "\
no peer is known yet. Hosts of one LAN find each other within seconds, if their firewalls let UDP 9999 (discovery.port)
and UDP 5353 (multicast DNS) in, and TCP 9999 (http.listen) for what they fetch from each other. A host that broadcasts
can't reach is named in discovery.targets, one that announces nothing as a [[peer]].";

#[derive(Deserialize)]
struct Row {
    id: String,
    url: String,
    source: String,
    peernix_version: String,
    known_for_seconds: u64,
    last_seen_seconds_ago: Option<f64>,
    failures: u64,
    paused: bool,
    latency_ms: Option<f64>,
    bytes_per_second: Option<f64>,
}

/// Asks the daemon at `url` and prints a table.
pub(super) fn peers(url: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rows: Vec<Row> = runtime.block_on(ask(url))?;
    let mut out = std::io::stdout().lock();
    if rows.is_empty() {
        writeln!(out, "{NOBODY}")?;
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
        row.last_seen_seconds_ago.map_or_else(|| "never".to_owned(), |ago| format!("{ago:.0}s ago")),
        or_dash(row.latency_ms.map(|ms| format!("{ms:.1} ms"))),
        or_dash(row.bytes_per_second.map(speed)),
        format!("{}{}", row.failures, if row.paused { ", paused" } else { "" }),
    ]
}

/// A small NAR takes as long as the question, and measures next to nothing.
fn speed(bytes_per_second: f64) -> String {
    if bytes_per_second < 1e6 {
        format!("{:.0} KB/s", (bytes_per_second / 1e3).ceil())
    } else {
        format!("{:.0} MB/s", bytes_per_second / 1e6)
    }
}

async fn ask(url: &str) -> anyhow::Result<Vec<Row>> {
    let client = crate::peer::http_client(url)?.timeout(ANSWER_TIME).build();
    let request = client.context("no HTTP client can be made")?;
    let request = request.get(format!("{}/api/v1/peers", url.trim_end_matches('/')));
    let answer = request.send().await.map_err(|error| told(url, &error))?;
    let answer = answer.error_for_status().map_err(|error| told(url, &error))?;
    let body = answer.bytes().await.map_err(|error| told(url, &error))?;
    serde_json::from_slice(&body)
        .map_err(|_| anyhow!("what answers at {url} is not this peernix: name another with --url"))
}

/// One line instead of a chain in which each layer says that the one below it failed.
fn told(url: &str, error: &reqwest::Error) -> anyhow::Error {
    if error.is_builder() {
        return anyhow!("{url:?} is no URL: --url reads http://127.0.0.1:9999");
    }
    if let Some(status) = error.status() {
        return anyhow!("what answers at {url} says {status}, as peernix would not: name another with --url");
    }
    let mut why: &dyn std::error::Error = error;
    while let Some(source) = why.source() {
        why = source;
    }
    let why = if error.is_timeout() { format!("nothing within {ANSWER_TIME:?}") } else { why.to_string() };
    anyhow!(
        "no daemon answers at {url} ({why}): see whether it runs (systemctl status peernix), or name another with --url"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_delivered_something_is_never_shown_with_nothing() {
        let shown = [1.0, 46_000.0, 999_999.0, 1e6, 117.4e6].map(speed);
        assert_eq!(shown, ["1 KB/s", "46 KB/s", "1000 KB/s", "1 MB/s", "117 MB/s"]);
    }
}
