//! What a host holds, as it tells others: a filter of all its paths, and the paths that it gained since.
//!
//! Pure. What comes from the network is checked here once: no bytes can make a lookup fail, and a host that tells of less
//! than it has is only asked less.
//!
//! A message is `peernix-holdings-2\n`, the id of the run that tells it (8 bytes), the number of its last gain (8), how
//! many gains follow (4; 4,096 at most), those (20 each), and then either nothing more, or a binary fuse filter: its seed (8), the
//! length of its segments (4), how far its first places reach (4), and its fingerprints of 10 bits without a gap. Numbers are
//! little-endian. With a filter it is the whole, without one a difference.

use std::collections::HashSet;

use bytes::{Buf as _, Bytes};

use super::path_filter::PathFilter;
use crate::nix::StorePathHash;

/// The longest message that is read or told, in bytes. A filter of two million paths takes three quarters of it.
pub(super) const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// The most gains beside a filter; with more it is time for another filter.
pub const MAX_GAINS: usize = 4096;

const MAGIC: &[u8] = b"peernix-holdings-2\n";

/// What one host tells another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Which run of which host: numbers of another one mean nothing.
    pub instance: u64,
    /// The number of the last gain that it covers.
    pub number: u64,
    /// Paths that came after the filter was made, or after what the asker knew.
    pub gains: Vec<StorePathHash>,
    /// All paths that were there before; `None` in a difference.
    pub filter: Option<PathFilter>,
}

impl Told {
    /// Writes it. `None`: it is longer than anybody would read.
    #[must_use]
    pub fn to_bytes(&self) -> Option<Bytes> {
        let filter = self.filter.as_ref().map_or(0, PathFilter::weight);
        let len = MAGIC.len() + 20 + self.gains.len() * StorePathHash::BYTES + filter;
        if len > MAX_MESSAGE {
            return None;
        }
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.instance.to_le_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.gains.len()).ok()?.to_le_bytes());
        self.gains.iter().for_each(|hash| bytes.extend_from_slice(hash.as_bytes()));
        if let Some(filter) = &self.filter {
            bytes.extend_from_slice(&filter.head());
            bytes.extend_from_slice(filter.fingerprints());
        }
        Some(bytes.into())
    }

    /// Reads it. `None`: it is none, or damaged.
    #[must_use]
    pub fn parse(mut bytes: Bytes) -> Option<Self> {
        if bytes.len() > MAX_MESSAGE || !bytes.starts_with(MAGIC) {
            return None;
        }
        bytes.advance(MAGIC.len());
        let instance = bytes.try_get_u64_le().ok()?;
        let number = bytes.try_get_u64_le().ok()?;
        let count = usize::try_from(bytes.try_get_u32_le().ok()?).ok().filter(|count| *count <= MAX_GAINS)?;
        let len = Some(count * StorePathHash::BYTES).filter(|len| *len <= bytes.len())?;
        let (gains, _) = bytes.as_chunks();
        let gains = gains.iter().take(count).copied().map(StorePathHash::from_bytes).collect();
        bytes.advance(len);
        let filter = if bytes.is_empty() { None } else { Some(PathFilter::parse(&bytes)?) };
        Some(Self { instance, number, gains, filter })
    }
}

/// What a peer holds, as far as it told.
#[derive(Clone, Debug)]
pub(super) struct PathSet {
    instance: u64,
    number: u64,
    filter: PathFilter,
    gains: HashSet<StorePathHash>,
}

impl PathSet {
    /// From the whole. `None`: it was a difference.
    pub(super) fn new(told: Told) -> Option<Self> {
        let Told { instance, number, gains, filter } = told;
        Some(Self { instance, number, filter: filter?, gains: gains.into_iter().collect() })
    }

    /// Takes in a difference to what is known. False: it is none to this, and the whole is needed.
    pub(super) fn add(&mut self, told: &Told) -> bool {
        let fits = told.filter.is_none() && told.instance == self.instance && told.number >= self.number;
        // Exactly as many as the numbers say: none between them is missing.
        if !fits || told.number - self.number != told.gains.len() as u64 {
            return false;
        }
        self.hint(&told.gains);
        self.number = told.number;
        told.gains.iter().all(|hash| self.gains.contains(hash))
    }

    /// Somebody said that it has these too; what is too much is left out, and told again as a difference.
    pub(super) fn hint(&mut self, hashes: &[StorePathHash]) {
        for hash in hashes {
            if self.gains.len() < MAX_GAINS {
                self.gains.insert(*hash);
            }
        }
    }

    pub(super) fn may_contain(&self, hash: &StorePathHash) -> bool {
        self.gains.contains(hash) || self.filter.may_contain(hash)
    }

    /// What the host is asked to tell the difference to.
    pub(super) fn version(&self) -> String {
        version(self.instance, self.number)
    }

    /// The memory that it takes, in bytes.
    pub(super) fn weight(&self) -> usize {
        self.filter.weight() + self.gains.capacity() * (StorePathHash::BYTES + 1)
    }
}

/// As it is written in URLs.
fn version(instance: u64, number: u64) -> String {
    format!("{instance:016x}-{number}")
}

/// The number that somebody knows of the run with this instance id. `None`: of another one, or nothing that we said.
#[must_use]
pub fn known_number(text: &str, instance: u64) -> Option<u64> {
    let number = text.strip_prefix(&format!("{instance:016x}-"))?.parse().ok()?;
    // Only one way to write it.
    (version(instance, number) == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::super::path_filter::tests::hashes;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_difference_is_taken_in_only_where_it_belongs() {
        let all = hashes(0, 100);
        let filter = PathFilter::new(&all[..50]);
        let whole = Told { instance: 7, number: 10, gains: all[50..60].to_vec(), filter };
        let mut set = PathSet::new(whole.clone()).unwrap();
        let difference =
            |instance, number, gains: &[_]| Told { instance, number, gains: gains.to_vec(), filter: None };
        assert!(set.add(&difference(7, 12, &all[60..62])));
        assert_eq!(set.version(), "0000000000000007-12");
        assert!(all[..62].iter().all(|hash| set.may_contain(hash)));
        // Of another run, from the past, with a gap, the whole again.
        assert!(!set.add(&difference(8, 13, &all[62..63])));
        assert!(!set.add(&difference(7, 11, &[])));
        assert!(!set.add(&difference(7, 15, &all[62..63])));
        assert!(!set.add(&whole));
        assert!(PathSet::new(difference(7, 10, &[])).is_none());
        // More than is kept is never taken for complete.
        let many = hashes(0, MAX_GAINS as u32 + 1);
        let too_many = difference(7, 12 + many.len() as u64, &many);
        assert!(!set.add(&too_many));
        assert_eq!(Told::parse(too_many.to_bytes().unwrap()), None);
    }

    #[test]
    fn a_message_is_read_and_written_as_other_hosts_do() {
        let all = hashes(0, 5);
        let filter = PathFilter::new(&all[..3]);
        let told = Told { instance: 0x0102_0304_0506_0708, number: 9, gains: all[3..4].to_vec(), filter };
        let bytes = told.to_bytes().unwrap();
        let text: String = bytes[MAGIC.len()..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            text,
            "0807060504030201090000000000000001000000\
             9d9f290527a6be626a8f5985b26e19b237b44872\
             c15c0289ec2d0a910800000008000000\
             00000000000000001200009c0b000000000000000000000000000000c006"
        );
        let set = Told::parse(bytes).and_then(PathSet::new).unwrap();
        assert!(all[..4].iter().all(|hash| set.may_contain(hash)) && !set.may_contain(&all[4]));
    }

    #[test]
    fn a_version_is_known_by_its_run() {
        assert_eq!(known_number("00000000000000ff-12", 255), Some(12));
        for text in ["", "-", "00000000000000ff-", "00000000000000fe-12", "00000000000000ff-+12", "ff-12"] {
            assert_eq!(known_number(text, 255), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_path_is_denied(count in 0u32..3000, more in 0u32..50) {
            let all = hashes(0, count + more);
            let (before, gains) = all.split_at(count as usize);
            let told = Told { instance: 1, number: 9, gains: gains.to_vec(), filter: PathFilter::new(before) };
            prop_assert!(told.filter.is_some());
            let read = Told::parse(told.to_bytes().unwrap()).unwrap();
            prop_assert_eq!(&read, &told);
            let set = PathSet::new(read).unwrap();
            prop_assert!(all.iter().all(|hash| set.may_contain(hash)));
        }

        #[test]
        fn any_bytes_are_a_set_or_nothing(mut bytes: Vec<u8>, is_ours: bool) {
            if is_ours {
                bytes.splice(0..0, MAGIC.iter().copied());
            }
            let _ = Told::parse(bytes.into());
        }

        #[test]
        fn a_damaged_message_is_no_danger(at: prop::sample::Index, value: u8, cut: prop::sample::Index) {
            let all = hashes(0, 300);
            let filter = PathFilter::new(&all);
            let told = Told { instance: 1, number: 9, gains: all[..3].to_vec(), filter };
            let mut bytes = told.to_bytes().unwrap().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = value;
            for bytes in [bytes.clone(), bytes[..cut.index(bytes.len())].to_vec()] {
                if let Some(set) = Told::parse(bytes.into()).and_then(PathSet::new) {
                    for hash in &all {
                        let _ = set.may_contain(hash);
                    }
                }
            }
        }
    }
}
