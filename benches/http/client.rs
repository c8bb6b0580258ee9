//! What asks: connections that read NARs and throw them away, and wrk.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::connection::Client;

/// Where a server has a NAR, and how long it is.
pub(crate) struct Nar {
    pub(crate) url: String,
    pub(crate) size: usize,
}

/// Asks for all narinfos, one after the other, and says where their NARs are, by hash part.
pub(crate) fn nars(address: SocketAddr, hashes: &[String]) -> HashMap<String, Nar> {
    let mut client = Client::connect(address).expect("a connection");
    let one = |hash: &String| {
        let answer = client.ask(&format!("/{hash}.narinfo")).expect("an answer");
        assert_eq!(answer.status, 200, "{hash} is served");
        let text = client.text(&answer).expect("a narinfo");
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        let nar =
            Nar { url: format!("/{}", field("URL: ")), size: field("NarSize: ").parse().expect("a number") };
        (hash.clone(), nar)
    };
    hashes.iter().map(one).collect()
}

/// What was read, and in what time.
pub(crate) struct Read {
    pub(crate) gigabytes: f64,
    took: Duration,
}

impl Read {
    /// In MB a second.
    pub(crate) fn rate(&self) -> f64 {
        self.gigabytes * 1e3 / self.took.as_secs_f64()
    }
}

/// Reads NARs over so many connections, each taking the next that nobody has taken.
pub(crate) fn read(address: SocketAddr, streams: usize, nars: Vec<&Nar>) -> Read {
    let next = AtomicUsize::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..streams {
            scope.spawn(|| {
                let mut client = Client::connect(address).expect("a connection");
                while let Some(nar) = nars.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answer = client.ask(&nar.url).expect("an answer");
                    assert_eq!((answer.status, answer.length), (200, nar.size), "{}", nar.url);
                    client.discard(&answer).expect("a whole NAR");
                }
            });
        }
    });
    let took = began.elapsed();
    Read { gigabytes: nars.iter().map(|nar| nar.size as f64).sum::<f64>() / 1e9, took }
}

/// What wrk says.
pub(crate) struct Walk {
    pub(crate) requests_per_second: f64,
    pub(crate) median_micros: f64,
}

/// Lets wrk ask for all paths of a file, over and over. `status` is what every answer has to be, 200 or 404.
pub(crate) fn walk(
    folder: &Path,
    address: SocketAddr,
    connections: usize,
    paths: &Path,
    status: u16,
) -> Walk {
    let script = folder.join("walk.lua");
    std::fs::write(&script, include_str!("walk.lua")).expect("a script");
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(connections);
    let mut wrk = Command::new("wrk");
    wrk.args(["--latency", "--duration", "2s", "--threads", &threads.to_string()]);
    wrk.args(["--connections", &connections.to_string(), "--script"]).arg(script);
    let output = wrk.arg(format!("http://{address}")).arg("--").arg(paths).output().expect("wrk");
    let text = String::from_utf8_lossy(&output.stdout);
    let told = text.lines().find_map(|line| line.strip_prefix("walked "));
    let told = told.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    let numbers: Vec<f64> = told.split(' ').map(|number| number.parse().expect("a number")).collect();
    let [requests, micros, refused, broken, median_micros] = numbers[..] else { panic!("{told}") };
    assert_eq!(broken, 0.0, "connections broke: {text}");
    assert_eq!(refused, if status == 404 { requests } else { 0.0 }, "not all are {status}: {text}");
    Walk { requests_per_second: requests / micros * 1e6, median_micros }
}
