//! Discovery as a whole: the tasks that announce, receive, look, check and save, started together and stopped together.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, stream};
use ipnet::IpNet;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::interfaces::broadcast_addresses;
use super::mdns::{self, Mdns};
use super::record::{Peer, Source};
use super::udp::{self, Sockets};
use super::wire::{FEATURE_GAINED, MAX_GAINED, Message};
use super::{LocalPaths, News, Options, Peers, follow, saved};
use crate::nix::StorePathHash;

/// How long the known peers may take to be written down at the end.
const SAVE_TIME: Duration = Duration::from_secs(1);
/// Announcements at start and after a change of interfaces, in quick succession: a lost one is made up for at once.
const BURST: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(250), Duration::from_millis(600), Duration::from_millis(1200)];
/// How long a health check may take.
const CHECK_TIME: Duration = Duration::from_secs(2);
/// Health checks at the same time: a file may name a thousand peers.
const CHECKS: usize = 64;
const SAVE_PERIOD: Duration = Duration::from_secs(30);
/// The first gain after a while is told at once; after it they are gathered for so long.
const GAIN_PAUSE: Duration = Duration::from_millis(100);
/// And told once more after so long: a path may be told of while it is still being registered.
const GAIN_AGAIN: Duration = Duration::from_millis(1500);
/// Gains that wait to be told; beyond it the store waits with more.
const MAX_WAITING_GAINS: usize = 16 * 1024;

/// Discovery that runs.
#[derive(Debug)]
pub struct Discovery {
    peers: Peers,
    options: Options,
    sockets: Option<Sockets>,
    mdns: Option<Mdns>,
    tasks: JoinSet<()>,
    file: Option<PathBuf>,
}

impl std::fmt::Debug for Mdns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mdns")
    }
}

impl Discovery {
    /// Starts it. Parts that can't be had are told in the log, and the rest works. `gained` gives the paths that the
    /// local store gains.
    #[must_use]
    pub fn start(
        peers: Peers,
        options: Options,
        allow: &[IpNet],
        local_paths: LocalPaths,
        gained: mpsc::Receiver<StorePathHash>,
        state: Option<PathBuf>,
    ) -> Self {
        let file = state.as_deref().map(Peers::saved_file);
        let mut tasks = JoinSet::new();
        for (announce, address) in
            file.as_deref().filter(|_| options.enable).map(saved::load).unwrap_or_default()
        {
            peers.announced(announce, address, Source::Saved);
        }
        if options.enable && !peers.0.listening.is_reachable() {
            tracing::info!(
                "not announced on the LAN: only this host can reach what http.listen names; peers are found all the same"
            );
        }
        let sockets = options.enable.then(|| Sockets::bind(options.port)).and_then(|bound| match bound {
            Ok(sockets) => Some(sockets),
            Err(error) => {
                tracing::error!(port = options.port, %error, "no announcements: the UDP port can't be had; another peernix may run (see discovery.port)");
                None
            }
        });
        if let Some(sockets) = &sockets {
            let allow: Arc<[IpNet]> = allow.into();
            tasks.spawn(udp::receive(peers.clone(), sockets.clone(), local_paths, allow));
            tasks.spawn(announce_for_ever(peers.clone(), options.clone(), sockets.clone()));
            tasks.spawn(tell_gains(peers.clone(), sockets.clone(), gained));
        }
        let mdns =
            (options.enable && options.mdns).then(|| Mdns::start(&peers)).and_then(|started| match started {
                Ok((mdns, events)) => {
                    tasks.spawn(mdns::follow(peers.clone(), events));
                    Some(mdns)
                }
                Err(error) => {
                    tracing::warn!(%error, "no multicast DNS; announcements find peers all the same");
                    None
                }
            });
        tasks.spawn(tell_put_off(peers.clone()));
        tasks.spawn(follow::follow_all(peers.clone()));
        tasks.spawn(look_after(peers.clone(), options.interval, file.clone()));
        Self { peers, options, sockets, mdns, tasks, file }
    }

    /// The UDP port, if there is one.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.sockets.as_ref().and_then(Sockets::port)
    }

    /// Says goodbye, saves who is known, and ends all tasks.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
        if let Some(sockets) = &self.sockets {
            say_goodbye(&self.peers, &self.options, sockets).await;
        }
        if let Some(mdns) = self.mdns.take() {
            let _ = tokio::time::timeout(Duration::from_secs(2), mdns.stop()).await;
        }
        // A disk that does not answer keeps nobody.
        let _ = tokio::time::timeout(SAVE_TIME, save(self.file, &self.peers)).await;
    }
}

/// Every link and every configured target.
fn everybody(options: &Options) -> Vec<SocketAddr> {
    let mut addresses = if options.port == 0 { Vec::new() } else { broadcast_addresses(options.port) };
    addresses.extend(&options.targets);
    addresses
}

async fn announce(peers: &Peers, options: &Options, sockets: &Sockets) {
    for address in everybody(options) {
        if let Some(own) = peers.own_announce_to(address) {
            send(peers, sockets, &Message::Announce(own), address).await;
        }
    }
}

/// Also to every known peer that has sent datagrams itself.
async fn say_goodbye(peers: &Peers, options: &Options, sockets: &Sockets) {
    let goodbye = Message::Goodbye(peers.own_id().to_owned());
    let mut addresses = everybody(options);
    addresses.extend(peers.all().iter().flat_map(Peer::datagrams));
    // Who never heard an announcement has nobody to forget.
    for address in addresses.into_iter().filter(|address| peers.own_announce_to(*address).is_some()) {
        send(peers, sockets, &goodbye, address).await;
    }
}

async fn send(peers: &Peers, sockets: &Sockets, message: &Message, to: SocketAddr) {
    sockets.send(&message.to_datagram(), to).await;
    peers.metrics().datagrams_sent.inc();
}

async fn announce_for_ever(peers: Peers, options: Options, sockets: Sockets) {
    let mut watcher = if_watch::tokio::IfWatcher::new()
        .inspect_err(|error| tracing::debug!(%error, "interfaces can't be watched; they are read again with each announcement"))
        .ok();
    loop {
        // A burst at start and whenever an interface comes or goes, then at the interval.
        for pause in BURST {
            sleep(pause).await;
            announce(&peers, &options, &sockets).await;
        }
        let mut ticks = interval(options.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            let changed = async {
                match &mut watcher {
                    Some(watcher) => {
                        let _ = watcher.next().await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = ticks.tick() => announce(&peers, &options, &sockets).await,
                () = changed => break,
            }
        }
    }
}

/// Tells the known peers which paths this host has gained, soon and once more a little later.
async fn tell_gains(peers: Peers, sockets: Sockets, mut gained: mpsc::Receiver<StorePathHash>) {
    // In the order of their times: each pause is the same for all.
    let mut soon: VecDeque<(Instant, StorePathHash)> = VecDeque::new();
    let mut again: VecDeque<(Instant, StorePathHash)> = VecDeque::new();
    let mut next_turn = Instant::now();
    loop {
        let next = soon.front().into_iter().chain(again.front()).map(|(due, _)| *due).min();
        let due = async {
            match next {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            hash = gained.recv(), if soon.len() < MAX_WAITING_GAINS => {
                let Some(hash) = hash else { return };
                soon.push_back((next_turn.max(Instant::now()), hash));
            }
            () = due => {
                let now = Instant::now();
                next_turn = now + GAIN_PAUSE;
                let mut hashes = take_due(&mut soon, now);
                again.extend(hashes.iter().map(|hash| (now + GAIN_AGAIN, *hash)));
                hashes.extend(take_due(&mut again, now));
                send_gains(&peers, &sockets, &hashes).await;
            }
        }
    }
}

fn take_due(queue: &mut VecDeque<(Instant, StorePathHash)>, now: Instant) -> Vec<StorePathHash> {
    let count = queue.partition_point(|(due, _)| *due <= now);
    queue.drain(..count).map(|(_, hash)| hash).collect()
}

async fn send_gains(peers: &Peers, sockets: &Sockets, hashes: &[StorePathHash]) {
    // So many that naming them would flood the LAN: then whatever was missed may be there.
    let parts: Vec<&[StorePathHash]> =
        if hashes.len() > 10 * MAX_GAINED { vec![&[]] } else { hashes.chunks(MAX_GAINED).collect() };
    let known = peers.all();
    for part in parts {
        let datagram = Message::Gained(part.to_vec()).to_datagram();
        // Whoever does not speak of it would take it for noise. Each address once, however many claim to be there.
        let listeners = known.iter().filter(|peer| peer.announce.has_feature(FEATURE_GAINED));
        let addresses: HashSet<SocketAddr> = listeners.flat_map(Peer::datagrams).collect();
        for address in addresses {
            sockets.send(&datagram, address).await;
            peers.metrics().datagrams_sent.inc();
        }
    }
}

/// Tells the news that were put off when it is their turn.
async fn tell_put_off(peers: Peers) {
    loop {
        let next = peers.flushes().next();
        let due = async {
            match next {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => if peers.flushes().take_due(Instant::now()) {
                peers.tell(News::Gained(Vec::new()));
            },
            () = peers.0.put_off.notified() => {}
        }
    }
}

/// Checks the silent, forgets the lost, saves the known.
async fn look_after(peers: Peers, period: Duration, file: Option<PathBuf>) {
    let mut ticks = interval((period / 4).clamp(Duration::from_millis(50), Duration::from_secs(2)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut saved = Instant::now();
    loop {
        ticks.tick().await;
        let silent = peers.registry().silent(period * 2, Instant::now());
        stream::iter(silent).for_each_concurrent(CHECKS, |peer| check(&peers, peer)).await;
        peers.expire();
        if saved.elapsed() >= SAVE_PERIOD {
            save(file.clone(), &peers).await;
            saved = Instant::now();
        }
    }
}

async fn check(peers: &Peers, peer: Peer) {
    let began = Instant::now();
    let checked = match peers.client(&peer) {
        Ok(client) => client.check(CHECK_TIME).await,
        Err(error) => Err(error),
    };
    match checked {
        Ok(()) => peers.succeeded(&peer.id, began.elapsed()),
        Err(error) => peers.failed(&peer.id, &error, began.elapsed()),
    }
}

async fn save(file: Option<PathBuf>, peers: &Peers) {
    let Some(file) = file else { return };
    let known = peers.all();
    let saved = tokio::task::spawn_blocking(move || saved::save(&file, &known)).await;
    if let Ok(Err(error)) = saved {
        tracing::warn!(%error, "the known peers can't be saved");
    }
}
