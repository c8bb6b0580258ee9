//! The end: what happened, and whether it was good.

use std::time::Duration;

use crate::Soak;
use crate::daemon::{Daemon, Sample};

/// Descriptors by which the second half may exceed the first, and rest after the load rest before it.
const SLACK: u64 = 16;

/// Memory by which the last quarter may exceed the one before, besides a fifth of it.
const SLACK_KIB: u64 = 16 * 1024;

/// A figure of a sample.
type Figure = fn(&Sample) -> u64;

/// Prints the summary; says whether everything that has to hold held.
pub(crate) fn report(soak: &Soak, local: &Daemon, samples: &[(Duration, Sample)], rest: &Sample) -> bool {
    let (tally, metrics) = (&soak.tally, local.metrics());
    let sum = |name: &str, label: &str| sum(&metrics, name, label);
    let mib = |bytes: f64| bytes / 1_048_576.0;
    let lines = [
        ("seconds", samples.last().map_or(0, |(at, _)| at.as_secs())),
        ("closures built", tally.built.get()),
        ("builds that failed", tally.not_built.get()),
        ("collections", tally.collections.get()),
        ("paths collected", tally.collected.get()),
        ("peers killed", tally.kills.get()),
        ("closures copied and verified", tally.copied.get()),
        ("copies of what was gone", tally.gone.get()),
        ("  though a steady peer kept it", tally.gone_though_kept.get()),
        ("copies that failed otherwise", tally.not_copied.get()),
        ("narinfos 200", tally.narinfos.get()),
        ("narinfos 404", tally.narinfos_missing.get()),
        ("NARs whole and right", tally.nars.get()),
        ("  of them by ranges", tally.nars_by_ranges.get()),
        ("NARs 404", tally.nars_missing.get()),
        ("NARs cut", tally.cut.get()),
        ("NARs left midway", tally.left.get()),
    ];
    println!();
    lines.iter().for_each(|(what, number)| println!("{what:<36}{number}"));
    println!("{:<36}{:.0} MiB", "NAR bytes served", mib(sum("http_response_bytes_total", "route=\"nar\"")));
    println!("{:<36}{:.0} MiB", "bytes from peers", mib(sum("relayed_bytes_total", "")));
    for (what, name) in [
        ("failovers", "relay_failovers_total"),
        ("downloads joined", "relays_joined_total"),
        ("downloads ahead", "relays_prepared_total"),
        ("store queries", "store_queries_total"),
        ("lease failures", "lease_failures_total"),
        ("nix-store restarts", "store_child_restarts_total"),
        ("peers' lies", "peer_lies_total"),
        ("spool memory now, bytes", "spool_memory_bytes"),
        ("spool disk now, bytes", "spool_disk_bytes"),
    ] {
        println!("{what:<36}{}", sum(name, ""));
    }
    println!("logged by the daemon:");
    let log = local.log();
    log.iter().for_each(|(message, (times, first))| println!("  {times} times {message}\n      {first}"));
    let (broken, decided) = soak.promises.judge();
    println!("{:<36}{decided}", "narinfos of what a collector had");
    let is_flat = is_flat(samples, rest);
    println!("open after the load:");
    local.descriptors().iter().for_each(|(kind, number)| println!("  {number} times {kind}"));
    // A NAR of the local store is leased while it is read.
    let local_cuts = log.get("WARN a NAR was cut short; the client was told by a closed connection");
    let answered_5xx = sum("http_requests_total", "status=\"5") as u64;
    let bad = [
        ("wrong bytes", tally.wrong.get()),
        ("5xx", tally.failed_5xx.get() + answered_5xx),
        ("unanswered or late", tally.unanswered.get()),
        ("broken promises of narinfos", broken),
        ("local NARs cut", local_cuts.map_or(0, |(times, _)| *times)),
    ];
    bad.iter().for_each(|(what, number)| println!("{what:<36}{number}"));
    let is_good = is_flat && bad.iter().all(|(_, number)| *number == 0) && tally.nars.get() > 0;
    println!("{}", if is_good { "good" } else { "NOT GOOD" });
    is_good
}

/// Prints what the daemon took; says whether its descriptors and its memory stayed as they were.
fn is_flat(samples: &[(Duration, Sample)], rest: &Sample) -> bool {
    let (idle, busy) = (&samples[0].1, &samples[1..]);
    let (first, second) = busy.split_at(busy.len() / 2);
    println!("{:<16}{:>8}{:>16}{:>16}{:>8}{:>8}", "", "before", "first half", "second half", "last", "after");
    println!("{:<16}{:>8}{:>16}{:>16}", "", "", "median/max", "median/max");
    let descriptors: Figure = |sample| sample.descriptors;
    let rss: Figure = |sample| sample.rss_kib;
    let others: [(&str, Figure); 2] =
        [("threads", |sample| sample.threads), ("children", |sample| sample.children)];
    for (what, of) in [("descriptors", descriptors), ("RSS, KiB", rss)].into_iter().chain(others) {
        let halves = [first, second].map(|half| {
            let (median, max) = median_and_max(half, of);
            format!("{median}/{max}")
        });
        let last = busy.last().map_or(0, |(_, sample)| of(sample));
        let [half1, half2] = halves;
        println!("{what:<16}{:>8}{half1:>16}{half2:>16}{last:>8}{:>8}", of(idle), of(rest));
    }
    let has_grown = median_and_max(second, descriptors).0 > median_and_max(first, descriptors).0 + SLACK
        || rest.descriptors > idle.descriptors + SLACK;
    // Only the second half: until then caches and buffers fill.
    let (third, fourth) = second.split_at(second.len() / 2);
    let before = median_and_max(third, rss).0;
    let is_larger = median_and_max(fourth, rss).0 > before + before / 5 + SLACK_KIB;
    println!("descriptors grew: {has_grown}, memory grows: {is_larger}");
    !has_grown && !is_larger
}

fn median_and_max(samples: &[(Duration, Sample)], of: Figure) -> (u64, u64) {
    let mut values: Vec<u64> = samples.iter().map(|(_, sample)| of(sample)).collect();
    values.sort_unstable();
    (values.get(values.len() / 2).copied().unwrap_or(0), values.last().copied().unwrap_or(0))
}

/// All values of a metric whose labels contain this.
fn sum(metrics: &str, name: &str, label: &str) -> f64 {
    let values = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix("peernix_")?.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        let is_it = (labels.is_empty() || labels.starts_with('{')) && labels.contains(label);
        is_it.then(|| value.parse::<f64>().ok())?
    });
    values.sum()
}
