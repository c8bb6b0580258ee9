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
can't reach is named in discovery.targets, one that announces nothing as a [[peer]]. With discovery.enable = false only
these are known.";

#[derive(Deserialize)]
struct Row {
    id: String,
    url: String,
    source: String,
    peernix_version: String,
    public_key: String,
    public_key_is_trusted: Option<bool>,
    known_for_seconds: u64,
    last_seen_seconds_ago: Option<f64>,
    successes: u64,
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
    let head = [
        "KEY",
        "TRUSTED",
        "URL",
        "FOUND BY",
        "VERSION",
        "KNOWN FOR",
        "SEEN",
        "ANSWERS IN",
        "DELIVERS",
        "FAILED",
        "ID",
    ];
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

fn cells(row: &Row) -> [String; 11] {
    let or_dash =
        |text: Option<String>| text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".to_owned());
    let trusted =
        row.public_key_is_trusted.map(|is_trusted| if is_trusted { "yes" } else { "no" }.to_owned());
    [
        or_dash(Some(key_names(&row.public_key))),
        or_dash(trusted),
        row.url.clone(),
        row.source.clone(),
        or_dash(Some(row.peernix_version.clone())),
        humantime::format_duration(Duration::from_secs(row.known_for_seconds)).to_string(),
        seen(row),
        or_dash(row.latency_ms.map(|ms| format!("{ms:.1} ms"))),
        or_dash(row.bytes_per_second.map(speed)),
        format!("{}{}", row.failures, if row.paused { ", paused" } else { "" }),
        // Who announces nothing is known by its URL alone.
        or_dash((row.id != row.url).then(|| row.id.clone())),
    ]
}

/// The names of keys, which tell the host: a key that peernix made is named after it, and its address may change.
fn key_names(keys: &str) -> String {
    let names = keys.split(' ').filter_map(|key| key.split_once(':'));
    names.map(|(name, _)| name).collect::<Vec<_>>().join(" ")
}

fn seen(row: &Row) -> String {
    match row.last_seen_seconds_ago {
        Some(ago) => format!("{ago:.0}s ago"),
        None if row.successes + row.failures == 0 => "not asked yet".to_owned(),
        None => "never".to_owned(),
    }
}

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
    // As it stands in nix.conf, too.
    let base = url.trim_end_matches('/').trim_end_matches("/nix-cache");
    let request = request.get(format!("{base}/api/v1/peers"));
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
    if error.status() == Some(reqwest::StatusCode::FORBIDDEN) {
        return anyhow!(
            "the daemon at {url} does not answer this host: its http.allow does not have the address"
        );
    }
    if error.status() == Some(reqwest::StatusCode::TOO_MANY_REQUESTS) {
        return anyhow!(
            "the daemon at {url} has had too many requests from this host (its limits.requests_per_second): ask again in some seconds"
        );
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
    fn a_peer_is_shown_by_its_keys_and_whether_they_are_trusted() {
        let row = serde_json::json!({
            "id": "0123456789abcdef", "url": "http://[fe80::1%2]:9999/nix-cache", "source": "announced",
            "peernix_version": "", "public_key": "host-1:AAAA other-2:BBBB", "public_key_is_trusted": false,
            "known_for_seconds": 1, "last_seen_seconds_ago": null, "successes": 0, "failures": 0, "paused": false,
            "latency_ms": null, "bytes_per_second": null,
        });
        let shown = cells(&serde_json::from_value(row.clone()).unwrap());
        assert_eq!((&*shown[0], &*shown[1]), ("host-1 other-2", "no"));
        assert_eq!((&*shown[4], &*shown[6], &*shown[8]), ("-", "not asked yet", "-"));
        // A cache that announces nothing, and never answered.
        let mut silent = row;
        silent["public_key"] = "".into();
        silent["public_key_is_trusted"] = serde_json::Value::Null;
        silent["id"] = silent["url"].clone();
        silent["failures"] = 1.into();
        let shown = cells(&serde_json::from_value(silent).unwrap());
        assert_eq!((&*shown[0], &*shown[1], &*shown[6], &*shown[10]), ("-", "-", "never", "-"));
    }

    #[test]
    fn whoever_delivered_something_is_never_shown_with_nothing() {
        let shown = [1.0, 46_000.0, 999_999.0, 1e6, 117.4e6].map(speed);
        assert_eq!(shown, ["1 KB/s", "46 KB/s", "1000 KB/s", "1 MB/s", "117 MB/s"]);
    }
}
