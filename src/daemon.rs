//! Wiring: the parts of the daemon put together, started in order and shut down in the opposite one.
//!
//! The same constructor serves `peernix serve`, `peernix try` and the tests.

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::{Config, ConfigError};
use crate::http::{BindError, Listeners, Server};
use crate::metrics::Metrics;
use crate::resolve::Resolver;
use crate::signing::{Signer, SigningError};
use crate::store::{OpenError, Store};

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
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    store: JoinHandle<()>,
}

impl Daemon {
    /// Starts everything. When it returns, requests are answered.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        // What can fail without a trace comes first, what leaves files behind after it.
        let configured = (!config.signing.keys.is_empty()).then(|| Signer::read(&config.signing));
        let configured = configured.transpose()?;
        let listeners = Listeners::bind(&config.http.listen).await?;
        let metrics = Metrics::new();
        let (store, store_task) = Store::open(config.store.clone(), &metrics.store)?;
        let signer = match configured {
            Some(signer) => signer,
            None => own_signer(&config.state.directory()?, &config.signing)?,
        };
        let signer = Arc::new(signer);
        let resolver = Resolver::new(store, Arc::clone(&signer));
        let server = Server::new(resolver, &config.http, &config.limits, metrics);
        let addresses = listeners.addresses();
        for address in &addresses {
            tracing::info!(%address, "listening");
        }
        tracing::info!(public_key = signer.public_key_line(), "serving the local store");
        let (stop, stopping) = watch::channel(false);
        let server = tokio::spawn(server.run(listeners, stopping));
        Ok(Self { addresses, signer, stop, server, store: store_task })
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The public keys of what it signs, as they stand in nix.conf.
    #[must_use]
    pub fn public_key_line(&self) -> String {
        self.signer.public_key_line()
    }

    /// Stops accepting, lets answers in flight end within `http.drain_time`, then ends the store's processes.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        // A panic in a task was printed when it happened; there is nothing to save here.
        let _ = self.server.await;
        let _ = self.store.await;
    }
}

fn own_signer(state: &Path, options: &crate::signing::Options) -> Result<Signer, StartError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state);
    made.map_err(|source| StartError::State { path: state.to_owned(), source })?;
    Ok(Signer::load(options, state)?)
}
