//! Who is asked for a path: those that may be asked now and do not say that they lack it.

use std::time::Instant;

use super::{Peer, Peers};
use crate::nix::StorePathHash;

impl Peers {
    /// The peers that may have the path and may be asked now, the best first, and whether somebody is left out who may come
    /// back. Who says that it does not have it need not be asked.
    #[must_use]
    pub fn candidates(&self, hash: &StorePathHash) -> (Vec<Peer>, bool) {
        let (registry, now) = (self.registry(), Instant::now());
        let mut denying = 0;
        let sets = self.0.sets.of(*hash);
        let candidates = registry.candidates(now, |id| {
            let denies = sets.denies(id);
            denying += u64::from(denies);
            !denies
        });
        self.0.metrics.not_asked.inc_by(denying);
        (candidates, registry.leaves_out_somebody(now))
    }

    /// Whether nobody need be asked for the path: all say that they do not have it, and nobody is left out.
    #[must_use]
    pub fn all_deny(&self, hash: &StorePathHash) -> bool {
        let (registry, now) = (self.registry(), Instant::now());
        let sets = self.0.sets.of(*hash);
        let mut asked = registry.iter().filter(|peer| peer.may_be_asked(now));
        let Some(denying) = asked.try_fold(0, |count, peer| sets.denies(&peer.id).then_some(count + 1))
        else {
            return false;
        };
        let all_deny = !registry.leaves_out_somebody(now);
        if all_deny {
            self.0.metrics.not_asked.inc_by(denying);
        }
        all_deny
    }
}
