//! Wiring: the parts of the daemon put together, started in order and shut down in the opposite one.
//!
//! The same constructor serves `peernix serve`, `peernix try` and the tests.

use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::cache::Spools;
use crate::config::{Config, ConfigError};
use crate::http::{BindError, Listeners, Server};
use crate::metrics::Metrics;
use crate::peer::{
    Announce, Discovery, FEATURE_GAINED, FEATURE_HOLDINGS, Listening, LocalPaths, MAX_GAINS, Peers,
};
use crate::resolve::{Parts, Resolver, Share};
use crate::signing::{Signer, SigningError};
use crate::store::{KEPT_GAINS, NarCopies, OpenError, Store, StoreState};
use crate::trust::Trust;

/// Gained paths that wait to be told to peers.
const GAINS: usize = 4096;
/// What the store keeps is what peers may be told at once.
const _: () = assert!(KEPT_GAINS == MAX_GAINS);
/// How long Nix may take to tell its version.
const VERSION_TIME: Duration = Duration::from_secs(5);
/// How long what is asked of Nix besides waits for what the first request needs.
const GREETING_TIME: Duration = Duration::from_millis(500);
/// How long whoever reads a download may take to notice that its connection is gone.
const LEAVE_TIME: Duration = Duration::from_secs(1);

/// Why the daemon can't start. Whatever was begun is undone.
#[derive(Debug, Error)]
pub enum StartError {
    /// The configuration names no place for the state.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No address can be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The state folder can't be made.
    #[error("the state folder {path} can't be made: {source}; see state.directory")]
    State {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// No key to sign with.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// The store can't be read.
    #[error(transparent)]
    Store(#[from] OpenError),
}

/// A daemon that serves.
#[derive(Debug)]
pub struct Daemon {
    addresses: Vec<SocketAddr>,
    signer: Arc<Signer>,
    peers: Peers,
    trust: Trust,
    discovery: Discovery,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    store: Store,
    store_task: JoinHandle<()>,
    share: Share,
    spools: Spools,
    followers: JoinSet<()>,
    _state_lock: Option<File>,
}

impl Daemon {
    /// Starts everything. When it returns, requests are answered.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        // What can fail without a trace comes first, what leaves files behind after it.
        let configured = (!config.signing.keys.is_empty()).then(|| Signer::read(&config.signing));
        let configured = configured.transpose()?;
        for file in config.signing.open_to_all() {
            let file = file.display();
            tracing::warn!(%file, "every user of this machine may read this secret key: chmod 600 it");
        }
        for why in config.http.shuts_out_own_nix().into_iter().chain(config.tells_no_targets()) {
            tracing::warn!("{why}");
        }
        let listeners = Listeners::bind(&config.http.listen).await?;
        let addresses = listeners.addresses();
        let metrics = Metrics::new();
        let (gained, gains) = mpsc::channel(GAINS);
        let nar_copies = config.limits.nar_copies.as_u64();
        let state = config.state.directory();
        let folder = state.as_deref().ok();
        let copies = NarCopies::new(folder.map(Path::to_owned), nar_copies, &metrics.store);
        let (store, store_task) = Store::open(config.store.clone(), folder, copies, &metrics.store, gained)?;
        let state = state.map(make_folder);
        let (signer, state) = match configured {
            // Without a folder the known peers are not saved, and that is all.
            Some(signer) => (signer, state.ok().and_then(Result::ok)),
            None => {
                let state = state??;
                (Signer::load(&config.signing, &state)?, Some(state))
            }
        };
        let state_lock = state.as_deref().and_then(locked);
        let signer = Arc::new(signer);
        let trust = Trust::new(config.trust.clone(), signer.public_keys(), store.store_dir().clone());
        let peers = peers(config, &signer, &addresses, &metrics)?;
        let limits = &config.limits;
        let spools = Spools::new(state.clone(), limits.relay_memory.as_u64(), limits.spool.as_u64());
        let share = Share::new(&config.share, store.clone(), peers.own_id(), limits.connections);
        let parts = Parts {
            store: store.clone(),
            signer: Arc::clone(&signer),
            peers: peers.clone(),
            trust: trust.clone(),
            share: share.clone(),
            spools: spools.clone(),
            metrics: metrics.lookups.clone(),
            relay_metrics: metrics.relay.clone(),
        };
        let resolver = Resolver::new(parts, &config.resolve, &config.cache);
        let mut followers = JoinSet::new();
        let nix_version = tell_nix_version(peers.clone(), config.store.nix_store.clone());
        followers.spawn(after_first_answer(store.clone(), nix_version));
        let nix_keys = trust.clone().follow_nix(signer.public_keys());
        followers.spawn(after_first_answer(store.clone(), nix_keys));
        followers.spawn(resolver.clone().follow_news());
        followers.spawn(resolver.clone().sweep());
        let server = Server::new(resolver, &config.http, &config.limits, metrics);
        for address in &addresses {
            tracing::info!(%address, "listening");
        }
        tracing::info!(public_key = signer.public_key_line(), "started");
        let (stop, stopping) = watch::channel(false);
        let server = tokio::spawn(server.run(listeners, stopping));
        let options = config.discovery.clone();
        let local_paths = local_paths(store.clone());
        let discovery =
            Discovery::start(peers.clone(), options, &config.http.allow, local_paths, gains, state);
        Ok(Self {
            addresses,
            signer,
            peers,
            trust,
            discovery,
            stop,
            server,
            store,
            store_task,
            share,
            spools,
            followers,
            _state_lock: state_lock,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The UDP port of its announcements, if there is one.
    #[must_use]
    pub fn udp_port(&self) -> Option<u16> {
        self.discovery.port()
    }

    /// Whom it knows.
    #[must_use]
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Asks the host's Nix again which keys it trusts. The rest of the configuration is read at start.
    pub async fn reload(&self) {
        self.trust.ask_nix(&self.signer.public_keys()).await;
    }

    /// The public keys of what it signs, as they stand in nix.conf.
    #[must_use]
    pub fn public_key_line(&self) -> String {
        self.signer.public_key_line()
    }

    /// Says goodbye, stops accepting, lets answers in flight end within `http.drain_time`, then ends the store's
    /// processes.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        self.share.close();
        // It holds the store, whose end is waited for below.
        drop(self.share);
        self.discovery.stop().await;
        self.followers.shutdown().await;
        // A panic in a task was printed when it happened; there is nothing to save here.
        let _ = self.server.await;
        // Whoever still reads after the drain time was cut off with its connection.
        if let Err(error) = self.spools.close(LEAVE_TIME).await {
            tracing::warn!(%error, "a spool is still read");
        }
        // A disk that does not answer keeps nobody.
        let _ = tokio::time::timeout(LEAVE_TIME, self.store.remember_names()).await;
        drop(self.store);
        let _ = self.store_task.await;
    }
}

fn make_folder(folder: PathBuf) -> Result<PathBuf, StartError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    match made {
        Ok(()) => Ok(folder),
        Err(source) => Err(StartError::State { path: folder, source }),
    }
}

/// The state folder, locked for as long as this is kept. Two daemons can do with one, but what is saved last stays.
fn locked(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    if let Err(TryLockError::WouldBlock) = file.try_lock() {
        let folder = folder.display();
        tracing::warn!(%folder, "another peernix has this state folder: name one for each by state.directory");
    }
    Some(file)
}

/// Who is known at the start, and what this host says of itself.
fn peers(
    config: &Config,
    signer: &Signer,
    addresses: &[SocketAddr],
    metrics: &Metrics,
) -> Result<Peers, StartError> {
    let id = Peers::fresh_id().map_err(|error| SigningError::Random(error.to_string()))?;
    let mut features = vec!["narhash".to_owned(), FEATURE_GAINED.to_owned()];
    if config.share.holdings {
        features.push(FEATURE_HOLDINGS.to_owned());
    }
    let own = Announce {
        peernix_version: env!("CARGO_PKG_VERSION").to_owned(),
        nix_version: String::new(),
        platform: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        features,
        public_key: signer.public_key_line(),
        id: Some(id),
        ..Announce::default()
    };
    let (listening, metrics) = (Listening::new(addresses), metrics.peers.clone());
    Ok(Peers::new(&config.discovery, &config.peer, &config.http.allow, own, listening, metrics))
}

/// Does it when the first `nix-store` answers or can't be started, and the names in the store are read: other programs of Nix that
/// start at the same moment would take the processors from what the first request waits for.
async fn after_first_answer(store: Store, then: impl Future<Output = ()>) {
    let mut state = store.state();
    let may_answer = async move {
        let _ = state.wait_for(|state| !matches!(state, StoreState::Starting)).await;
        store.names_read().await;
    };
    // However slow it is: the keys that Nix trusts are waited for too.
    let _ = tokio::time::timeout(GREETING_TIME, may_answer).await;
    then.await;
}

/// Asks Nix for its version, which is told to peers; nothing hangs on it, and nothing waits for it.
async fn tell_nix_version(peers: Peers, program: PathBuf) {
    let mut nix_store = tokio::process::Command::new(program);
    nix_store.arg("--version").kill_on_drop(true).stdin(std::process::Stdio::null());
    if let Ok(Ok(output)) = tokio::time::timeout(VERSION_TIME, nix_store.output()).await {
        let text = String::from_utf8_lossy(&output.stdout);
        peers.set_nix_version(text.lines().next().unwrap_or_default());
    }
}

/// What other hosts are told of the local store.
fn local_paths(store: Store) -> LocalPaths {
    LocalPaths::new(move |hash| {
        let store = store.clone();
        async move {
            match store.path(&hash).await {
                Ok(known) => Some(known.map(|known| known.info.nar_hash)),
                Err(_) => None,
            }
        }
    })
}
