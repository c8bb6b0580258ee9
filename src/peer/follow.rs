//! Follows what the peers hold: one question to each stays open until the peer gains a path, or for a while.
//!
//! No datagram has to arrive for it, and a set is believed only as long as its peer answers for it: whatever goes wrong,
//! the peer is asked for every path again, as one that tells nothing.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::client::{HoldingsAnswer, PeerClient};
use super::path_set::Told;
use super::record::{Peer, PeerId, Source};
use super::sets::{ANSWER_TIME, Sets, WAIT};
use super::wire::FEATURE_HOLDINGS;
use super::{News, Peers};

/// From one question to the next, at least: who gains one path after the other tells several at once.
const PAUSE: Duration = Duration::from_millis(200);
/// The first pause after a question in vain, and the longest.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// After how long the whole is asked for again: paths that are gone stay in a set until then.
const RENEW: Duration = Duration::from_secs(15 * 60);
/// How often newcomers are looked for.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// Peers that are followed, each over a connection of its own; the others are asked for every path.
const MAX_FOLLOWED: usize = 256;

impl Peers {
    /// The peers that tell what they hold: they announce it, or nobody could and they are peernix too. With each, whether it
    /// ever answered: those that did not may be made up, and leave places for the others.
    fn that_tell(&self) -> Vec<(PeerId, bool)> {
        let clients = self.clients();
        let is_peernix = |id: &PeerId| clients.get(id).is_some_and(PeerClient::is_peernix);
        let registry = self.registry();
        let told = |peer: &&Peer| match peer.source {
            Source::Configured => is_peernix(&peer.id),
            Source::Announced | Source::Mdns | Source::Saved => peer.announce.has_feature(FEATURE_HOLDINGS),
        };
        registry.iter().filter(told).map(|peer| (peer.id.clone(), peer.is_proven())).collect()
    }

    fn sets(&self) -> &Sets {
        &self.0.sets
    }
}

/// Follows all that can be followed. Ends when dropped.
pub(super) async fn follow_all(peers: Peers) {
    let (mut tasks, mut followed) = (JoinSet::new(), HashSet::new());
    let mut ticks = interval(LOOK_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                for (id, is_proven) in peers.that_tell() {
                    let places = if is_proven { MAX_FOLLOWED } else { MAX_FOLLOWED / 2 };
                    if followed.len() < places && followed.insert(id.clone()) {
                        tasks.spawn(follow(peers.clone(), id));
                    }
                }
            }
            Some(ended) = tasks.join_next() => {
                if let Ok(id) = ended {
                    followed.remove(&id);
                }
            }
        }
    }
}

/// Follows one peer until it is forgotten. Gives who that was.
async fn follow(peers: Peers, id: PeerId) -> PeerId {
    let mut retry = FIRST_RETRY;
    let mut renewed = Instant::now();
    while peers.get(&id).is_some() {
        let asked = Instant::now();
        let known = peers.sets().version(&id).filter(|_| renewed.elapsed() < RENEW);
        let pause = match ask(&peers, &id, known.as_deref()).await {
            Some(is_whole) => {
                if is_whole {
                    renewed = Instant::now();
                }
                retry = FIRST_RETRY;
                PAUSE.saturating_sub(asked.elapsed())
            }
            None => {
                peers.sets().remove(&id);
                let pause = retry;
                retry = (retry * 2).min(LAST_RETRY);
                pause
            }
        };
        sleep(pause).await;
    }
    peers.sets().remove(&id);
    id
}

/// Asks once. Gives whether it told the whole; `None`: it told nothing that is of use.
async fn ask(peers: &Peers, id: &PeerId, known: Option<&str>) -> Option<bool> {
    let peer = peers.get(id).filter(|peer| !peer.is_paused(Instant::now()))?;
    let client = peers.client(&peer).ok()?;
    let within = if known.is_some() { WAIT + ANSWER_TIME } else { ANSWER_TIME };
    let answer = client.holdings(known, within, peers.sets().reading()).await;
    let answer = answer
        .inspect_err(|error| tracing::debug!(peer.id = %id, %error, "a peer does not tell what it holds"));
    let bytes = match answer.ok()? {
        HoldingsAnswer::AsKnown => {
            peers.sets().heard(id);
            return known.map(|_| false);
        }
        HoldingsAnswer::Told(bytes) => bytes,
    };
    peers.metrics().holdings_bytes.inc_by(bytes.len() as u64);
    let Some(told) = Told::parse(bytes) else {
        tracing::debug!(peer.id = %id, "what a peer tells of what it holds is not understood: is it of another version?");
        return None;
    };
    let (is_whole, gains) = (told.filter.is_some(), told.gains.clone());
    let before = peers.sets().version(id);
    if !peers.sets().take(id, told) {
        return None;
    }
    if peers.sets().version(id) == before {
        return Some(is_whole);
    }
    // After the set: a miss that is noted from now on was asked of the new one.
    match peer.address {
        _ if !is_whole => peers.tell(News::Gained(gains)),
        // What came between the last answer and this one is not known by name.
        Some(address) => drop(peers.flush(address.ip(), News::Came)),
        None => peers.tell(News::Came),
    }
    Some(is_whole)
}
