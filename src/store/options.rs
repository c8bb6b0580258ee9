//! `[store]`: what can be set about the local store.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;

use super::{ChildError, OpenError};

/// `[store]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// The folder below which the store lies, as in `nix-store --store DIR`: its paths are in `DIR/nix/store`.
    /// Default: the machine's own store.
    pub root: Option<PathBuf>,
    /// The `nix-store` program: a name that is looked for in PATH, or a path. Default: `nix-store`.
    pub nix_store: PathBuf,
    /// How long a path that somebody asked about is kept from garbage collection, at least. 1s to 1day; default 10min.
    #[serde(with = "humantime_serde")]
    pub lease: Duration,
    /// How many paths one `nix-store` process keeps from collection before another takes over. 1,000 to 10,000,000;
    /// default 100,000.
    pub leases: usize,
    /// How long a question to `nix-store` may take before the process is replaced. 100ms to 10min; default 10s.
    #[serde(with = "humantime_serde")]
    pub query_timeout: Duration,
    /// How long a request waits for `nix-store`; then it is answered with 404, and Nix asks elsewhere. 50ms to 10min;
    /// default 2s.
    #[serde(with = "humantime_serde")]
    pub answer_time: Duration,
    /// How much memory remembered path information may take. At least 1 MiB; default 32 MiB.
    pub remember: ByteSize,
    /// The longest build log that is served, unpacked. At most 1 GiB; default 16 MiB.
    pub log_size: ByteSize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            root: None,
            nix_store: PathBuf::from("nix-store"),
            lease: Duration::from_secs(600),
            leases: 100_000,
            query_timeout: Duration::from_secs(10),
            answer_time: Duration::from_secs(2),
            remember: ByteSize::mib(32),
            log_size: ByteSize::mib(16),
        }
    }
}

impl Options {
    /// What is out of range, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        let range = |key: &str, good: bool, range: &str| {
            if good { Ok(()) } else { Err(format!("store.{key}: has to be {range}")) }
        };
        let day = Duration::from_secs(24 * 60 * 60);
        range("lease", (Duration::from_secs(1)..=day).contains(&self.lease), "1s to 1day")?;
        range("leases", (1_000..=10_000_000).contains(&self.leases), "1000 to 10000000")?;
        let timeout = Duration::from_millis(100)..=Duration::from_secs(600);
        range("query_timeout", timeout.contains(&self.query_timeout), "100ms to 10min")?;
        let answer = Duration::from_millis(50)..=Duration::from_secs(600);
        range("answer_time", answer.contains(&self.answer_time), "50ms to 10min")?;
        range("remember", self.remember >= ByteSize::mib(1), "at least 1 MiB")?;
        range("log_size", self.log_size <= ByteSize::gib(1), "at most 1 GiB")?;
        if self.nix_store.as_os_str().is_empty() {
            let what =
                "store.nix_store: is empty; name the program, or leave the key out for the nix-store in PATH";
            return Err(what.to_owned());
        }
        match &self.root {
            Some(root) if !root.is_absolute() => {
                Err(format!("store.root: {} is not an absolute path", root.display()))
            }
            _ => Ok(()),
        }
    }

    /// The real folder that holds the store paths.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.root.as_deref().map_or_else(|| "/nix/store".into(), |root| root.join("nix/store"))
    }

    /// Whether there is a store yet. One that can't be read, or a `root` that does not exist, is an error.
    pub fn is_there(&self) -> Result<bool, OpenError> {
        let unreadable =
            |directory: &Path, source| OpenError::Unreadable { directory: directory.to_owned(), source };
        if let Some(root) = &self.root {
            // nix-store would make it, and a slip of the pen would look like an empty store.
            match std::fs::metadata(root) {
                Ok(found) if found.is_dir() => {}
                Ok(_) => return Err(unreadable(root, ErrorKind::NotADirectory.into())),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Err(OpenError::Missing(root.clone()));
                }
                Err(error) => return Err(unreadable(root, error)),
            }
        }
        let directory = self.directory();
        match std::fs::read_dir(&directory) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(unreadable(&directory, error)),
        }
    }

    /// Whether the `nix-store` program can be started by whoever asks.
    pub fn find_nix_store(&self) -> Result<(), ChildError> {
        let program = self.nix_store.display().to_string();
        let mut nix_store = Command::new(&self.nix_store);
        nix_store.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match nix_store.status() {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(ChildError::Missing(program)),
            Err(source) => Err(ChildError::Start { program, source }),
        }
    }

    /// The real folder that holds the build logs.
    #[must_use]
    pub fn log_directory(&self) -> PathBuf {
        let logs = "nix/var/log/nix/drvs";
        self.root.as_deref().map_or_else(|| PathBuf::from("/").join(logs), |root| root.join(logs))
    }
}
