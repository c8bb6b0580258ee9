//! One peer: who it is, where, how it was found and asked, and what is known of it.
//!
//! Knows nothing of the others: who is let in, and who has to go, is `peer::registry`.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::blame::Standing;
use super::wire::Announce;

/// Who a peer is, apart from where it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(String);

impl PeerId {
    /// The peer with this instance id.
    #[must_use]
    pub fn instance(id: &str) -> Self {
        Self(id.to_owned())
    }

    /// The host that is known by where it serves alone.
    #[must_use]
    pub fn place(place: impl fmt::Display) -> Self {
        Self(place.to_string())
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a peer was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// By its announcement.
    Announced,
    /// By multicast DNS.
    Mdns,
    /// By the configuration: it is never removed.
    Configured,
    /// From the file of peers that were known before the last restart.
    Saved,
}

/// How a peer is asked whether it has a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// By a request for the narinfo; it answers from its own store alone.
    Http,
    /// By a datagram first: peernix in Go would ask the whole LAN itself if it were asked by HTTP.
    Datagram(SocketAddr),
}

/// Where a peer is reached.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) url: String,
    pub(super) address: Option<SocketAddr>,
    pub(super) udp: Option<SocketAddr>,
    pub(super) asking: Asking,
}

/// What is known of a peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Who.
    pub id: PeerId,
    /// Its binary cache, without a slash at the end.
    pub url: String,
    /// Where that is, unless only the configuration's URL is known.
    pub address: Option<SocketAddr>,
    /// Where its datagrams come from, if any did.
    pub udp: Option<SocketAddr>,
    /// How it is asked.
    pub asking: Asking,
    /// How it was found.
    pub source: Source,
    /// What it said of itself last.
    pub announce: Announce,
    /// Since when it is known.
    pub first_seen: Instant,
    /// When it answered or announced itself last, if ever.
    pub last_seen: Option<Instant>,
    /// What it did well and badly.
    pub standing: Standing,
    /// Moving average of the time to an answer.
    pub latency: Option<Duration>,
    /// Moving average of what it delivers, in bytes a second. `None` until it delivered enough at once to measure.
    pub bytes_per_second: Option<f64>,
    /// Requests to it that are under way.
    pub in_flight: u32,
    /// When its announcement was answered last.
    pub(super) greeted: Option<Instant>,
    /// Where else it announced itself last, and when.
    pub(super) elsewhere: Option<(Place, Instant)>,
    /// It is taken to be here since another place failed, and was not tried here yet.
    pub(super) is_untried: bool,
}

impl Peer {
    /// Whether it is at this address, by its cache or its datagrams.
    pub(super) fn is_at(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.address.iter().chain(&self.udp).any(|known| known.ip().to_canonical() == address)
    }

    /// Where its datagrams come from: both families often, and it may know this host by either.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = SocketAddr> {
        self.udp.into_iter().chain(self.elsewhere.iter().filter_map(|(place, _)| place.udp))
    }

    /// From now on it is asked there; where it was is not forgotten.
    pub(super) fn move_to(&mut self, place: Place) {
        let before = Place {
            url: std::mem::replace(&mut self.url, place.url),
            address: std::mem::replace(&mut self.address, place.address),
            udp: std::mem::replace(&mut self.udp, place.udp),
            asking: std::mem::replace(&mut self.asking, place.asking),
        };
        self.elsewhere = Some((before, self.last_seen.unwrap_or(self.first_seen)));
        self.is_untried = true;
    }

    /// Whether it is asked for paths: not paused, and not only known from before the last restart.
    #[must_use]
    pub fn may_be_asked(&self, now: Instant) -> bool {
        !self.is_paused(now) && self.source != Source::Saved
    }

    /// Whether it ever answered, or the configuration names it: others may be made up.
    #[must_use]
    pub fn is_proven(&self) -> bool {
        self.standing.successes > 0 || self.source == Source::Configured
    }

    /// Whether it failed so lately that it is not asked.
    #[must_use]
    pub fn is_paused(&self, now: Instant) -> bool {
        self.standing.is_paused(now)
    }

    /// For how long nothing was heard of it, or could have been.
    pub(super) fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last_seen.unwrap_or(self.first_seen))
    }
}
