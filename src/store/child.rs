//! One `nix-store --serve --write` process: started, greeted, asked, ended.
//!
//! The process holds the temporary garbage-collector root of every path that it was asked about, for as long as it
//! lives. Which process is asked, and when it is replaced, is not known here ([`super::lease_office`]).

use std::collections::HashMap;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use super::Options;
use crate::nix::narinfo::PathInfo;
use crate::nix::serve::{self, ReadError};
use crate::nix::{StoreDir, StorePath};

/// How long a process may take to end after it was asked to; then it is killed.
const END_TIME: Duration = Duration::from_secs(2);

/// The largest item of an answer, in bytes: what is told of a path with a hundred thousand references.
const MAX_ITEM: usize = 16 * 1024 * 1024;
/// The longest line of its stderr that is kept, in bytes.
const MAX_LINE: u64 = 16 * 1024;

/// Why `nix-store` can't be asked.
#[derive(Debug, Error)]
pub enum ChildError {
    /// No such program.
    #[error("{0} was not found: install Nix, or set store.nix_store")]
    Missing(String),
    /// It can't be started.
    #[error("{program} can't be started: {source}")]
    Start {
        /// What was to be started.
        program: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// It ended before it said anything.
    #[error("{0} ended before it said anything: is it nix-store? See store.nix_store")]
    Silent(String),
    /// It ended, or closed its output.
    #[error("nix-store ended{}", quoted(.0))]
    Ended(String),
    /// It answers in a way that is not understood.
    #[error("nix-store answers what can't be understood: {0}")]
    Protocol(ReadError),
    /// No answer within `store.query_timeout`.
    #[error("nix-store did not answer within {0:?} (store.query_timeout)")]
    Timeout(Duration),
    /// It died a moment ago and is started again later.
    #[error("nix-store is away, and tried again in {0:?}")]
    BackOff(Duration),
}

fn quoted(stderr: &str) -> String {
    let hint = if stderr.contains("daemon-socket") && stderr.contains("ermission denied") {
        "; peernix's user has to be in the group that may use nix-daemon (on Debian: nix-users)"
    } else {
        ""
    };
    if stderr.is_empty() { String::new() } else { format!(": {stderr}{hint}") }
}

/// A running process that was greeted.
#[derive(Debug)]
pub(super) struct Child {
    process: tokio::process::Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    /// Bytes of an answer that have arrived and were not read yet.
    buffer: BytesMut,
    complaint: Complaint,
    store_dir: StoreDir,
    query_timeout: Duration,
}

impl Child {
    /// Starts the process and greets it.
    pub(super) async fn start(options: &Options, store_dir: &StoreDir) -> Result<Self, ChildError> {
        let program = options.nix_store.display().to_string();
        let mut process = command(options).spawn().map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ChildError::Missing(program.clone()),
            _ => ChildError::Start { program: program.clone(), source },
        })?;
        let (stdin, stdout, stderr) =
            match (process.stdin.take(), process.stdout.take(), process.stderr.take()) {
                (Some(stdin), Some(stdout), Some(stderr)) => (stdin, stdout, stderr),
                _ => return Err(ChildError::Ended("it has no pipes".to_owned())),
            };
        let mut child = Self {
            process,
            stdin,
            stdout,
            buffer: BytesMut::with_capacity(64 * 1024),
            complaint: Complaint::follow(stderr),
            store_dir: store_dir.clone(),
            query_timeout: options.query_timeout,
        };
        let Self { stdin, stdout, buffer, store_dir, .. } = &mut child;
        let receive = item(stdout, buffer, store_dir, |reader| reader.hello());
        let done = exchange(options.query_timeout, stdin, &serve::hello(), receive).await;
        match child.explain(done).await {
            Ok(_) => Ok(child),
            Err(ChildError::Ended(said)) if said.is_empty() => Err(ChildError::Silent(program)),
            Err(error) => Err(error),
        }
    }

    /// Leases the paths, then asks what is known of them. Those that are not valid are not in the answer. Not to be
    /// dropped midway: the next answer would be read in the place of this one.
    pub(super) async fn query(
        &mut self,
        paths: &[StorePath],
    ) -> Result<HashMap<StorePath, PathInfo>, ChildError> {
        let mut request = Vec::new();
        serve::query_valid_paths(&mut request, paths.iter(), &self.store_dir);
        serve::query_path_infos(&mut request, paths.iter(), &self.store_dir);
        let Self { stdin, stdout, buffer, store_dir, .. } = self;
        let receive = async {
            let valid = item(stdout, buffer, store_dir, |reader| reader.valid_paths()).await?;
            let mut infos = HashMap::with_capacity(valid.len());
            while let Some(told) = item(stdout, buffer, store_dir, |reader| reader.path_info()).await? {
                match told {
                    Ok(info) if valid.contains(&info.store_path) => {
                        infos.insert(info.store_path.clone(), info);
                    }
                    Ok(_) => {}
                    Err(error) => tracing::debug!(%error, "a path is not served"),
                }
            }
            Ok(infos)
        };
        let done = exchange(self.query_timeout, stdin, &request, receive).await;
        self.explain(done).await
    }

    /// Resolves when the process has ended by itself.
    pub(super) async fn ended(&mut self) -> (std::io::Result<ExitStatus>, ChildError) {
        let status = self.process.wait().await;
        (status, ChildError::Ended(self.complaint.latest()))
    }

    /// Ends the process, and with it its leases.
    pub(super) async fn end(mut self) {
        drop(self.stdin);
        drop(self.stdout);
        if timeout(END_TIME, self.process.wait()).await.is_err() {
            // Nothing is lost by it: the process only reads.
            let _ = self.process.kill().await;
        }
    }

    /// An end of the pipe is told with what the process said on its way out.
    async fn explain<T>(&mut self, done: Result<T, ExchangeError>) -> Result<T, ChildError> {
        match done {
            Ok(answer) => Ok(answer),
            Err(ExchangeError::Read(error)) => Err(ChildError::Protocol(error)),
            Err(ExchangeError::Timeout) => Err(ChildError::Timeout(self.query_timeout)),
            Err(ExchangeError::Ended) => {
                let _ = timeout(END_TIME, self.process.wait()).await;
                self.complaint.drained().await;
                Err(ChildError::Ended(self.complaint.latest()))
            }
        }
    }

    /// Whether the process is gone.
    pub(super) fn is_gone(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }
}

/// Why a request got no answer.
enum ExchangeError {
    Ended,
    Timeout,
    Read(ReadError),
}

/// Sends a request while its answer is read: each side's pipe may be full while the other still writes.
async fn exchange<T>(
    within: Duration,
    stdin: &mut ChildStdin,
    request: &[u8],
    receive: impl Future<Output = Result<T, ExchangeError>>,
) -> Result<T, ExchangeError> {
    let send = async {
        // A pipe that is closed shows as the end of the answer.
        let _ = stdin.write_all(request).await;
        let _ = stdin.flush().await;
    };
    let both = async { tokio::join!(send, receive).1 };
    timeout(within, both).await.unwrap_or(Err(ExchangeError::Timeout))
}

/// Reads one item of an answer, waiting for as much of it as is not there yet. What was read is not read again.
async fn item<T>(
    stdout: &mut ChildStdout,
    buffer: &mut BytesMut,
    store_dir: &StoreDir,
    read: impl Fn(&mut serve::Reader<'_>) -> Result<T, ReadError>,
) -> Result<T, ExchangeError> {
    loop {
        let mut reader = serve::Reader::new(buffer, store_dir);
        match read(&mut reader) {
            Ok(item) => {
                let consumed = reader.consumed();
                buffer.advance(consumed);
                return Ok(item);
            }
            Err(ReadError::Incomplete) if buffer.len() > MAX_ITEM => {
                let (got, bound) = (buffer.len() as u64, MAX_ITEM as u64);
                return Err(ExchangeError::Read(ReadError::TooLong { got, bound }));
            }
            Err(ReadError::Incomplete) => {}
            Err(error) => return Err(ExchangeError::Read(error)),
        }
        buffer.reserve(64 * 1024);
        match stdout.read_buf(buffer).await {
            Ok(0) | Err(_) => return Err(ExchangeError::Ended),
            Ok(_) => {}
        }
    }
}

fn command(options: &Options) -> Command {
    let mut command = Command::new(&options.nix_store);
    if let Some(root) = &options.root {
        command.arg("--store").arg(root);
    }
    command.args(["--serve", "--write"]);
    // Without these it answers from its own memory: a path added after a miss stays a miss, one deleted stays valid.
    command.args(["--option", "narinfo-cache-positive-ttl", "0"]);
    command.args(["--option", "narinfo-cache-negative-ttl", "0"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // In a group of its own: Ctrl-C is for us, and bodies in flight still need the leases while they drain.
    command.process_group(0).kill_on_drop(true);
    command
}

/// What the process said last on stderr.
#[derive(Debug)]
struct Complaint {
    latest: Arc<Mutex<String>>,
    follower: tokio::task::JoinHandle<()>,
}

impl Complaint {
    /// Follows stderr until the process closes it.
    fn follow(stderr: ChildStderr) -> Self {
        let latest = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&latest);
        let follower = tokio::spawn(async move {
            let (mut lines, mut line) = (BufReader::new(stderr), Vec::new());
            loop {
                line.clear();
                // A line without an end is cut, so that no program can fill our memory.
                match (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line).await {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                tracing::debug!(line, "nix-store says");
                if !line.is_empty() {
                    *kept.lock().unwrap_or_else(PoisonError::into_inner) = line;
                }
            }
        });
        Self { latest, follower }
    }

    async fn drained(&mut self) {
        if !self.follower.is_finished() {
            let _ = timeout(END_TIME, &mut self.follower).await;
        }
    }

    fn latest(&self) -> String {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
