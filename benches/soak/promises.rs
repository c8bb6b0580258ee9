//! Narinfos of the local store whose NAR was not there within the lease, and whose fault that was.
//!
//! A collector may have decided on a path, together with all that refer to it, before the daemon leased it: whether Nix then
//! still spares it is not certain, and until its turn the path is valid for whoever asks. So what a collector deleted that
//! had begun before the narinfo was answered counts apart. It is printed, since a lease that does not hold may hide there too.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Instant;

use crate::nix::Deletion;

/// A narinfo whose NAR was not there.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    pub(crate) hash_part: String,
    pub(crate) asked: Instant,
    pub(crate) answered: Instant,
    pub(crate) missing: Instant,
}

/// Compared at the end: a collector tells late what it deleted.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    broken: Mutex<Vec<Broken>>,
    deletions: Mutex<HashMap<String, Deletion>>,
}

impl Promises {
    pub(crate) fn broken(&self, broken: Broken) {
        self.broken.lock().expect("the promises").push(broken);
    }

    pub(crate) fn deleted(&self, deletions: Vec<Deletion>) {
        let deletions = deletions.into_iter().map(|deletion| (deletion.hash_part.clone(), deletion));
        self.deletions.lock().expect("the deletions").extend(deletions);
    }

    /// How many the daemon has broken, and how many a collector that had decided before.
    pub(crate) fn judge(&self) -> (u64, u64) {
        let deletions = self.deletions.lock().expect("the deletions");
        let (mut daemon, mut collector) = (0, 0);
        for broken in self.broken.lock().expect("the promises").iter() {
            let Broken { hash_part, asked, answered, missing } = broken;
            let deletion = deletions.get(hash_part);
            let after = |at: &Instant| at.saturating_duration_since(*asked).as_millis();
            let before = |at: &Instant| answered.saturating_duration_since(*at).as_millis();
            println!(
                "no NAR {} ms after its narinfo, which took {} ms: {hash_part}, {}",
                after(missing),
                after(answered),
                deletion.map_or("and nobody deleted it".to_owned(), |deletion| format!(
                    "deleted {} ms after it was asked for, by a collector that began {} ms before the answer",
                    after(&deletion.at),
                    before(&deletion.collection)
                ))
            );
            let was_decided = deletion.is_some_and(|deletion| deletion.collection < *answered);
            *(if was_decided { &mut collector } else { &mut daemon }) += 1;
        }
        (daemon, collector)
    }
}
