//! What a client will ask for next: Nix asks for the narinfos of all it wants first, and then fetches one NAR after the other.
//!
//! `nix copy` sorts what it wants: each path after those it refers to, and both the paths and the references of each in the
//! order of their hash parts. So its next NAR is known, as long as it wants all that it has asked for. How far that is relied
//! on follows from how often it was right; a wrong guess costs a download that nobody reads, within the memory that spools may
//! take. Pure but for its lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::nix::StorePathHash;

/// Paths that are remembered; with more, all are forgotten: what was told so long ago is hardly still to be fetched.
const MAX_TOLD: usize = 8 * 1024;
/// How many are guessed at most, and how many at first.
const FARTHEST: usize = 8;
const AT_FIRST: usize = 2;
/// Clients that fetch a few NARs at once ask for them in nearly this order.
const DISORDER: usize = 4;

/// What was told, and in which order it will be fetched. Cheap to clone: all clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct Ahead(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    /// Paths whose narinfo was given out and whose NAR was not asked for, and what they refer to.
    told: HashMap<StorePathHash, Vec<StorePathHash>>,
    /// The order of what is told, made when it is needed.
    order: Vec<StorePathHash>,
    places: HashMap<StorePathHash, usize>,
    is_stale: bool,
    /// The place after the latest that was asked for.
    next: usize,
    /// How many may be guessed.
    reach: usize,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            told: HashMap::new(),
            order: Vec::new(),
            places: HashMap::new(),
            is_stale: false,
            next: 0,
            reach: AT_FIRST,
        }
    }
}

impl Ahead {
    /// A client got the narinfo of a path with these references.
    pub(super) fn told(&self, hash: StorePathHash, references: impl Iterator<Item = StorePathHash>) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.told.len() >= MAX_TOLD {
            *table = Table::default();
        }
        if table.told.contains_key(&hash) {
            return;
        }
        table.told.insert(hash, references.filter(|reference| *reference != hash).collect());
        table.is_stale = true;
    }

    /// A client asks for the NAR of a path. Returns what it will ask for next, the first first.
    pub(super) fn asked(&self, hash: &StorePathHash) -> Vec<StorePathHash> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut table.is_stale) {
            table.sort();
        }
        table.told.remove(hash);
        let Some(place) = table.places.get(hash).copied() else { return Vec::new() };
        // The first of all was not guessed.
        if table.next > 0 {
            let is_right = place < table.next.saturating_add(DISORDER) && table.next < place + DISORDER;
            table.reach = if is_right { (table.reach + 1).min(FARTHEST) } else { table.reach / 2 };
        }
        table.next = place + 1;
        let after = table.order.iter().skip(place + 1).filter(|hash| table.told.contains_key(hash));
        after.take(table.reach).copied().collect()
    }
}

impl Table {
    /// Makes the order anew, of what is still to be asked for.
    fn sort(&mut self) {
        let mut sorted: Vec<_> = self.told.keys().map(|hash| (hash.to_string(), *hash)).collect();
        sorted.sort_unstable();
        let rank: HashMap<_, _> = sorted.iter().enumerate().map(|(rank, (_, hash))| (*hash, rank)).collect();
        self.order.clear();
        self.places.clear();
        // Depth first, without recursion: chains of references may be long.
        let mut visited = vec![false; sorted.len()];
        let mut open: Vec<(usize, Vec<usize>)> = Vec::new();
        for root in 0..sorted.len() {
            let mut found = Some(root);
            loop {
                if let Some(path) = found.take().filter(|path| !std::mem::replace(&mut visited[*path], true))
                {
                    let references = self.told.get(&sorted[path].1).into_iter().flatten();
                    let mut below: Vec<_> = references.filter_map(|hash| rank.get(hash).copied()).collect();
                    // The last is taken first.
                    below.sort_unstable_by(|one, other| other.cmp(one));
                    open.push((path, below));
                }
                let Some((path, below)) = open.last_mut() else { break };
                found = below.pop();
                if found.is_none() {
                    let hash = sorted[*path].1;
                    self.places.insert(hash, self.order.len());
                    self.order.push(hash);
                    open.pop();
                }
            }
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(letter: u8) -> StorePathHash {
        StorePathHash::parse(&[letter; 32]).unwrap()
    }

    fn told(ahead: &Ahead, path: u8, references: &[u8]) {
        ahead.told(hash(path), references.iter().map(|reference| hash(*reference)));
    }

    fn hashes(letters: &[u8]) -> Vec<StorePathHash> {
        letters.iter().map(|letter| hash(*letter)).collect()
    }

    #[test]
    fn what_refers_to_others_comes_after_them_and_before_what_is_next_to_it() {
        let ahead = Ahead::default();
        // From the root down, as Nix asks; d refers to itself too.
        told(&ahead, b'a', b"dc");
        told(&ahead, b'c', b"");
        told(&ahead, b'd', b"db");
        told(&ahead, b'b', b"c");
        told(&ahead, b'0', b"d");
        // Nix: 0 first, so d, so b, so c.
        assert_eq!(ahead.asked(&hash(b'c')), hashes(b"bd"));
        assert_eq!(ahead.asked(&hash(b'b')), hashes(b"d0a"));
        assert_eq!(ahead.asked(&hash(b'd')), hashes(b"0a"));
        assert_eq!(ahead.asked(&hash(b'0')), hashes(b"a"));
        assert!(ahead.asked(&hash(b'a')).is_empty());
        assert!(ahead.asked(&hash(b'z')).is_empty(), "nobody was told of it");
    }

    #[test]
    fn a_client_with_another_order_is_guessed_no_more_until_it_follows_this_one() {
        let ahead = Ahead::default();
        let letters = b"0123456789abcdfghijklmnpqrsvwxyz";
        letters.iter().for_each(|letter| told(&ahead, *letter, b""));
        assert_eq!(ahead.asked(&hash(b'h')), hashes(b"ij"));
        assert_eq!(ahead.asked(&hash(b'0')).len(), 1);
        assert!(ahead.asked(&hash(b'z')).is_empty());
        assert!(ahead.asked(&hash(b'1')).is_empty());
        // Two at once, and nearly in order.
        assert_eq!(ahead.asked(&hash(b'3')), hashes(b"4"));
        assert_eq!(ahead.asked(&hash(b'2')), hashes(b"45"));
        assert_eq!(ahead.asked(&hash(b'4')), hashes(b"567"));
    }

    #[test]
    fn chains_of_references_may_be_long_and_circles_end() {
        let ahead = Ahead::default();
        let hash = |number: usize| StorePathHash::parse(format!("{number:0>32}").as_bytes()).unwrap();
        for number in 0..MAX_TOLD {
            ahead.told(hash(number), [hash(number + 1), hash(number / 2)].into_iter());
        }
        let last = hash(MAX_TOLD - 1);
        assert_eq!(ahead.asked(&last), [hash(MAX_TOLD - 2), hash(MAX_TOLD - 3)]);
        for number in MAX_TOLD..3 * MAX_TOLD {
            ahead.told(hash(number), std::iter::empty());
        }
        assert!(ahead.0.lock().unwrap().told.len() <= MAX_TOLD);
    }
}
