//! One `nix-store --serve --write` process: started, greeted, asked, ended.
//!
//! The process holds the temporary garbage-collector root of every path that it was asked about, for as long as it
//! lives. Which process is asked, and when it is replaced, is not known here ([`super::leases`]).

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
        child.exchange(&serve::hello(), |reader| reader.hello()).await?;
        Ok(child)
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
        self.exchange(&request, |reader| {
            let valid = reader.valid_paths()?;
            let mut infos = HashMap::with_capacity(valid.len());
            while let Some(info) = reader.path_info()? {
                if valid.contains(&info.store_path) {
                    infos.insert(info.store_path.clone(), info);
                }
            }
            Ok(infos)
        })
        .await
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

    /// Sends a request and reads until its answer is there, within the deadline.
    async fn exchange<T>(
        &mut self,
        request: &[u8],
        read: impl Fn(&mut serve::Reader<'_>) -> Result<T, ReadError>,
    ) -> Result<T, ChildError> {
        let Self { stdin, stdout, buffer, store_dir, .. } = self;
        // Both at once: each side's pipe may be full while the other still writes.
        let send = async {
            stdin.write_all(request).await?;
            stdin.flush().await
        };
        let receive = async {
            loop {
                let mut reader = serve::Reader::new(buffer, store_dir);
                match read(&mut reader) {
                    Ok(answer) => {
                        let consumed = reader.consumed();
                        buffer.advance(consumed);
                        return Ok(answer);
                    }
                    Err(ReadError::Incomplete) => {}
                    Err(error) => return Err(Some(error)),
                }
                match stdout.read_buf(buffer).await {
                    Ok(0) | Err(_) => return Err(None),
                    Ok(_) => {}
                }
            }
        };
        let both = async { tokio::join!(send, receive).1 };
        match timeout(self.query_timeout, both).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Some(error))) => Err(ChildError::Protocol(error)),
            Ok(Err(None)) => {
                // It says why on its way out.
                let _ = timeout(END_TIME, self.process.wait()).await;
                self.complaint.drained().await;
                Err(ChildError::Ended(self.complaint.latest()))
            }
            Err(_) => Err(ChildError::Timeout(self.query_timeout)),
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
    /// Follows stderr to its end. The task ends with the process.
    fn follow(stderr: ChildStderr) -> Self {
        let latest = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&latest);
        let follower = tokio::spawn(async move {
            // A line without an end is cut, so that no program can fill our memory.
            let mut lines = BufReader::new(stderr.take(1024 * 1024)).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                tracing::debug!(line, "nix-store says");
                if !line.trim().is_empty() {
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
