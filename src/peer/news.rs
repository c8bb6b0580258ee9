//! News of the peers: what changes what is known of the LAN, for whoever remembers something of it.

use std::net::IpAddr;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::broadcast;

use super::flushes::Flushes;
use super::{PeerId, Peers};
use crate::nix::StorePathHash;

/// News that wait for whoever follows them; who falls behind is told so, and believes nothing remembered.
pub(super) const NEWS: usize = 1024;

/// What changes what is known of the LAN.
#[derive(Clone, Debug)]
pub enum News {
    /// A peer that was not there may have anything.
    Came,
    /// A peer has these paths now; none named means that they were too many.
    Gained(Vec<StorePathHash>),
}

impl Peers {
    /// Everything that changes from now on.
    #[must_use]
    pub fn news(&self) -> broadcast::Receiver<News> {
        self.0.news.subscribe()
    }

    /// A peer at this address has these paths now; none named means that they were too many.
    pub(super) fn gained(&self, hashes: Vec<StorePathHash>, from: IpAddr) {
        if hashes.is_empty() {
            self.flush(from.to_canonical(), News::Gained(hashes));
        } else {
            // Before the news: a miss that is noted after them was asked of whoever has it now.
            let there: Vec<PeerId> = self.registry().at(from).map(|peer| peer.id.clone()).collect();
            there.iter().for_each(|id| self.0.sets.hint(id, &hashes));
            self.tell(News::Gained(hashes));
        }
    }

    /// News after which nothing remembered is believed. True: now; else soon, since this address had its turn.
    pub(super) fn flush(&self, from: IpAddr, news: News) -> bool {
        let is_now = self.flushes().ask(from, Instant::now());
        if is_now {
            self.tell(news);
        } else {
            self.0.put_off.notify_one();
        }
        is_now
    }

    pub(super) fn flushes(&self) -> MutexGuard<'_, Flushes> {
        self.0.flushes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That nobody listens is no failure.
    pub(super) fn tell(&self, news: News) {
        let _ = self.0.news.send(news);
    }
}
