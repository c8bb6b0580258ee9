//! What asks: a small blocking client that throws away what it reads, and wrk.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Large enough that the client's system calls are not what is measured.
const BUFFER: usize = 512 * 1024;

/// One connection, kept for many requests.
pub(crate) struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    length: usize,
    /// What of the body came with the head: where it lies in the buffer.
    begun: std::ops::Range<usize>,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Self { stream, buffer: vec![0; BUFFER] })
    }

    /// Asks, and reads the head.
    pub(crate) fn ask(&mut self, path: &str) -> io::Result<Answer> {
        self.stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n").as_bytes())?;
        let mut filled = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[filled..])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += read;
            let Some(end) = self.buffer[..filled].windows(4).position(|end| end == b"\r\n\r\n") else {
                continue;
            };
            let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            let (Some(status), Some(length)) = (status, length) else {
                return Err(io::Error::new(io::ErrorKind::InvalidData, head));
            };
            return Ok(Answer { status, length, begun: end + 4..filled });
        }
    }

    /// Reads the body and keeps it.
    pub(crate) fn text(&mut self, answer: &Answer) -> io::Result<String> {
        let mut text = self.buffer[answer.begun.clone()].to_vec();
        let begun = text.len();
        text.resize(answer.length, 0);
        self.stream.read_exact(&mut text[begun..])?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Reads the body and throws it away.
    fn discard(&mut self, answer: &Answer) -> io::Result<()> {
        let mut rest = answer.length - answer.begun.len();
        while rest > 0 {
            match self.stream.read(&mut self.buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => rest -= read,
            }
        }
        Ok(())
    }
}

/// Where a server has a NAR, and how long it is.
pub(crate) struct Nar {
    url: String,
    size: usize,
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
