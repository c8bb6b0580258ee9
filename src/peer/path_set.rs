//! What a host holds, as it tells others: a filter of all its paths, and the paths that it gained since.
//!
//! Pure. A filter says "maybe" or "no", and its "no" holds for every path that it was made from. What comes from the network
//! is checked here once: no bytes can make a lookup fail, and a host that tells of less than it has is only asked less.
//!
//! A message is `peernix-holdings-1\n`, the id of the run that tells it (8 bytes), the number of its last gain (8), how
//! many gains follow (4), those (20 each), and then either nothing more, or a binary fuse filter: its descriptor (20) and
//! its fingerprints, one byte each. Numbers are little-endian. With a filter it is the whole, without one a difference.

use std::collections::HashSet;

use bytes::{Buf as _, Bytes};
use xorf::{BinaryFuse8, BinaryFuse8Ref, DmaSerializable as _, Filter as _, FilterRef as _};

use crate::nix::StorePathHash;

/// The longest message that is read or told, in bytes. A filter takes half of it: two million paths.
pub(super) const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// The most gains beside a filter; with more it is time for another filter.
pub const MAX_GAINS: usize = 4096;

const MAGIC: &[u8] = b"peernix-holdings-1\n";
const DESCRIPTOR: usize = BinaryFuse8::DESCRIPTOR_LEN;

/// A filter of paths: about 9.3 bits for each, and one "maybe" in 256 for paths that are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathFilter {
    descriptor: [u8; DESCRIPTOR],
    fingerprints: Bytes,
}

impl PathFilter {
    /// Of these paths. `None`: there is none for them, or it would be too long to be told.
    #[must_use]
    pub fn new(hashes: &[StorePathHash]) -> Option<Self> {
        let mut keys: Vec<u64> = hashes.iter().map(key).collect();
        keys.sort_unstable();
        // Twice the same key makes a filter impossible.
        keys.dedup();
        if keys.len() > MAX_MESSAGE / 2 {
            return None;
        }
        let made = BinaryFuse8::try_from(&keys).ok()?;
        let mut descriptor = [0; DESCRIPTOR];
        made.dma_copy_descriptor_to(&mut descriptor);
        let filter = Self { descriptor, fingerprints: Bytes::from(Vec::from(made.fingerprints)) };
        // A path that its own filter denies would never be found: better none at all.
        (filter.is_sound() && hashes.iter().all(|hash| filter.may_contain(hash))).then_some(filter)
    }

    /// Whether the path may be one of them.
    #[must_use]
    pub fn may_contain(&self, hash: &StorePathHash) -> bool {
        BinaryFuse8Ref::from_dma(&self.descriptor, &self.fingerprints).contains(&key(hash))
    }

    fn parse(mut bytes: Bytes) -> Option<Self> {
        let descriptor = bytes.get(..DESCRIPTOR)?.try_into().ok()?;
        bytes.advance(DESCRIPTOR);
        let filter = Self { descriptor, fingerprints: bytes };
        filter.is_sound().then_some(filter)
    }

    /// Whether every place that the crate looks at for any path is there: it does not check that itself.
    fn is_sound(&self) -> bool {
        let mut rest = self.descriptor.get(8..).unwrap_or_default();
        let Ok(segment) = rest.try_get_u32_le() else { return false };
        let Ok(mask) = rest.try_get_u32_le() else { return false };
        let Ok(begins) = rest.try_get_u32_le() else { return false };
        // Three segments one behind the other, the first of them beginning before `begins`.
        segment.is_power_of_two()
            && mask == segment - 1
            && begins >= segment
            && begins.is_multiple_of(segment)
            && u64::from(begins) + 2 * u64::from(segment) == self.fingerprints.len() as u64
    }

    fn weight(&self) -> usize {
        DESCRIPTOR + self.fingerprints.len()
    }
}

/// The first bits of what is a hash already.
fn key(hash: &StorePathHash) -> u64 {
    hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

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
            bytes.extend_from_slice(&filter.descriptor);
            bytes.extend_from_slice(&filter.fingerprints);
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
        let count = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
        let len = count.checked_mul(StorePathHash::BYTES).filter(|len| *len <= bytes.len())?;
        let (gains, _) = bytes.as_chunks();
        let gains = gains.iter().take(count).copied().map(StorePathHash::from_bytes).collect();
        bytes.advance(len);
        let filter = if bytes.is_empty() { None } else { Some(PathFilter::parse(bytes)?) };
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
    /// From the whole. `None`: it was a difference, or too much of one.
    pub(super) fn new(told: Told) -> Option<Self> {
        let Told { instance, number, gains, filter } = told;
        let gains: HashSet<StorePathHash> = gains.into_iter().collect();
        (gains.len() <= MAX_GAINS).then_some(Self { instance, number, filter: filter?, gains })
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
        self.filter.weight() + MAX_GAINS.min(self.gains.capacity()) * 2 * StorePathHash::BYTES
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
    use super::*;
    use proptest::prelude::*;

    fn hashes(from: u32, to: u32) -> Vec<StorePathHash> {
        use sha2::{Digest as _, Sha256};
        let hash = |number: u32| {
            let digest = Sha256::digest(number.to_le_bytes());
            StorePathHash::from_bytes(*digest.first_chunk().unwrap())
        };
        (from..to).map(hash).collect()
    }

    #[test]
    fn a_filter_is_small_and_seldom_wrong() {
        let (here, elsewhere) = (hashes(0, 100_000), hashes(100_000, 200_000));
        let filter = PathFilter::new(&here).unwrap();
        assert!(here.iter().all(|hash| filter.may_contain(hash)));
        let wrong = elsewhere.iter().filter(|hash| filter.may_contain(hash)).count();
        assert!(wrong < 500, "{wrong}");
        let bits = filter.weight() as f64 * 8.0 / here.len() as f64;
        assert!(bits < 10.0, "{bits}");
    }

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
        assert!(!set.add(&difference(7, 12 + many.len() as u64, &many)));
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
        fn a_filter_of_a_stranger_can_not_be_looked_up_beyond_its_end(
            seed: u64, segment_bits in 0u32..12, mask in prop::option::of(any::<u32>()), begins in 0u32..20_000,
            is_multiple: bool, len in prop::option::of(0usize..20_000),
        ) {
            let segment = 1u32 << segment_bits;
            let begins = if is_multiple { begins / segment * segment } else { begins };
            let fitting = (begins + 2 * segment) as usize;
            let mut bytes = seed.to_le_bytes().to_vec();
            for part in [segment, mask.unwrap_or(segment - 1), begins] {
                bytes.extend_from_slice(&part.to_le_bytes());
            }
            bytes.resize(DESCRIPTOR + len.unwrap_or(fitting), 0x5a);
            if let Some(filter) = PathFilter::parse(bytes.into()) {
                for hash in hashes(0, 200) {
                    let _ = filter.may_contain(&hash);
                }
            }
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
