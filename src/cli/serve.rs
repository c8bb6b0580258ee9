//! `peernix serve`: the daemon as a process, from its start to the signal that ends it.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::logging;
use crate::config::Config;
use crate::daemon::Daemon;

/// Signals this soon after the first are the same request to end: `timeout` sends one to the process and one to its group.
const SAME_REQUEST: Duration = Duration::from_millis(200);

pub(super) fn serve(config: Config) -> anyhow::Result<()> {
    logging::start(&config.log)?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("the runtime can't be started")?;
    let done = runtime.block_on(run(config));
    // A read from a disk that does not answer must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let mut hangup = on(SignalKind::hangup())?;
    let daemon = Daemon::start(&config).await?;
    // Without systemd there is nobody to tell, and that is fine.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                tracing::info!("asking Nix for its keys again; the rest of the configuration is read at start");
                daemon.reload().await;
            }
        }
    }
    let asked = Instant::now();
    let drain_time = config.http.drain_time;
    tracing::info!(
        ?drain_time,
        "stopping; answers in flight may come to their end, a second signal ends them"
    );
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let second = async {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if asked.elapsed() >= SAME_REQUEST {
                break;
            }
        }
    };
    tokio::select! {
        () = daemon.shutdown() => tracing::info!("stopped"),
        () = second => anyhow::bail!("ended by a second signal"),
    }
    Ok(())
}

fn on(kind: SignalKind) -> anyhow::Result<Signal> {
    signal(kind).context("signals can't be received")
}

/// A connection and a file for each client: 1,024 descriptors, the usual default, are soon too few.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of descriptors stays as it is");
    }
}
