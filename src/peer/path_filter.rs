//! A filter of paths: whether somebody may have one of them.
//!
//! Pure. It says "maybe" or "no", and its "no" holds for every path that it was made from. What comes from the network is
//! checked here once: no bytes can make a question fail.
//!
//! It is a binary fuse filter: the fingerprint of a path is the XOR of what lies at three places. The crate makes those of 8,
//! 16 or 32 bits. Ours are the lower 10 of its 16, since an XOR holds for each bit alone: among 50 peers 8 bits let every fifth
//! question about a path that nobody has through to one of them, and 16 are more to tell and to keep than that is worth. That the
//! places are found here as the crate finds them is seen whenever a filter is made: it must know all its paths.

use bytes::{Buf as _, BufMut as _, Bytes};
use xorf::BinaryFuse16;

use crate::nix::StorePathHash;

/// Of a fingerprint, in bits: one "maybe" in 1,024 for paths that are not in the filter.
const WIDTH: usize = 10;
/// What is written before the fingerprints, in bytes.
const HEAD: usize = 16;
/// Paths that a filter is made of, at most; so many take three megabytes.
const MAX_PATHS: usize = 2 * 1024 * 1024;

/// A filter of paths: about 12 bits for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathFilter {
    seed: u64,
    /// The places of a segment: a power of two.
    segment: u32,
    /// The first of a path's three places lies below this: a multiple of `segment`.
    begins: u32,
    /// One behind the other without a gap, the lowest bits first.
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
        if keys.len() > MAX_PATHS {
            return None;
        }
        let BinaryFuse16 { descriptor, fingerprints } = BinaryFuse16::try_from(&keys).ok()?;
        let filter = Self {
            seed: descriptor.seed,
            segment: descriptor.segment_length,
            begins: descriptor.segment_count_length,
            fingerprints: packed(&fingerprints),
        };
        // A path that its own filter denies would never be found: better none at all.
        (filter.is_sound() && hashes.iter().all(|hash| filter.may_contain(hash))).then_some(filter)
    }

    /// Whether the path may be one of them.
    #[must_use]
    pub fn may_contain(&self, hash: &StorePathHash) -> bool {
        let mixed = mixed(key(hash).wrapping_add(self.seed));
        let fingerprint = mixed ^ (mixed >> 32);
        let found = self.places(mixed).into_iter().fold(0, |found, place| found ^ self.at(place));
        (u64::from(found) ^ fingerprint).trailing_zeros() as usize >= WIDTH
    }

    /// Where the fingerprint of a path lies: a place in each of three segments, one behind the other.
    fn places(&self, mixed: u64) -> [u32; 3] {
        let first = ((u128::from(mixed) * u128::from(self.begins)) >> 64) as u32;
        let mask = self.segment - 1;
        let second = (first + self.segment) ^ ((mixed >> 18) as u32 & mask);
        let third = (first + 2 * self.segment) ^ (mixed as u32 & mask);
        [first, second, third]
    }

    /// What lies at a place, and bits of its neighbour above it. All places of a sound filter are there.
    fn at(&self, place: u32) -> u16 {
        let bit = place as usize * WIDTH;
        let bytes = self.fingerprints.get(bit / 8..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| u16::from_le_bytes(*bytes) >> (bit % 8))
    }

    /// Reads one: its head, and all that follows. `None`: it is none.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let filter = Self {
            seed: rest.try_get_u64_le().ok()?,
            segment: rest.try_get_u32_le().ok()?,
            begins: rest.try_get_u32_le().ok()?,
            // A copy: a part of the message would keep all of it.
            fingerprints: Bytes::copy_from_slice(rest),
        };
        filter.is_sound().then_some(filter)
    }

    /// Whether every place where a path may be looked for is there, and nothing else.
    fn is_sound(&self) -> bool {
        // Three segments one behind the other, the first of them beginning before `begins`.
        let places = u64::from(self.begins) + 2 * u64::from(self.segment);
        self.segment.is_power_of_two()
            && self.begins >= self.segment
            && self.begins.is_multiple_of(self.segment)
            && (places * WIDTH as u64).div_ceil(8) == self.fingerprints.len() as u64
    }

    /// As it is written, before the fingerprints.
    pub(super) fn head(&self) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        let mut rest = &mut head[..];
        rest.put_u64_le(self.seed);
        rest.put_u32_le(self.segment);
        rest.put_u32_le(self.begins);
        head
    }

    /// As they are written.
    pub(super) fn fingerprints(&self) -> &[u8] {
        &self.fingerprints
    }

    /// Its length as it is written, in bytes.
    pub(super) fn weight(&self) -> usize {
        HEAD + self.fingerprints.len()
    }
}

/// The first bits of what is a hash already.
fn key(hash: &StorePathHash) -> u64 {
    hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Every bit of a key in every bit: MurmurHash3's last step, which the crate mixes with.
fn mixed(key: u64) -> u64 {
    let key = (key ^ (key >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let key = (key ^ (key >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    key ^ (key >> 33)
}

/// The lower bits of each, one behind the other.
fn packed(fingerprints: &[u16]) -> Bytes {
    let mut packed = vec![0; (fingerprints.len() * WIDTH).div_ceil(8)];
    for (place, fingerprint) in fingerprints.iter().enumerate() {
        let bit = place * WIDTH;
        let bits = (fingerprint & ((1 << WIDTH) - 1)) << (bit % 8);
        if let Some(bytes) = packed.get_mut(bit / 8..).and_then(|bytes| bytes.first_chunk_mut::<2>()) {
            *bytes = (u16::from_le_bytes(*bytes) | bits).to_le_bytes();
        }
    }
    packed.into()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(in super::super) fn hashes(from: u32, to: u32) -> Vec<StorePathHash> {
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
        assert!(wrong < 150, "{wrong}");
        let bits = filter.weight() as f64 * 8.0 / here.len() as f64;
        assert!(bits < 12.0, "{bits}");
    }

    #[test]
    fn the_lower_bits_of_all_fingerprints_are_kept() {
        for count in [0, 1, 2, 3, 100, 5000] {
            let hashes = hashes(0, count);
            let filter = PathFilter::new(&hashes).unwrap();
            let mut keys: Vec<u64> = hashes.iter().map(key).collect();
            keys.sort_unstable();
            let whole = BinaryFuse16::try_from(&keys).unwrap();
            for (place, fingerprint) in whole.fingerprints.iter().enumerate() {
                let kept = filter.at(place as u32);
                assert_eq!((kept ^ fingerprint) & ((1 << WIDTH) - 1), 0, "{place} of {count}");
            }
        }
    }

    #[test]
    fn a_filter_of_a_stranger_is_looked_up_within_its_bounds_or_not_at_all() {
        for segment in [0, 1, 2, 3, 4, 12, 1 << 10, 1 << 14] {
            // The last one is no multiple.
            for begins in [0, segment, 2 * segment, 3 * segment, 7 * segment, 7 * segment + 1] {
                let fitting = ((begins + 2 * segment) as usize * WIDTH).div_ceil(8);
                for len in [fitting.saturating_sub(1), fitting, fitting + 1] {
                    let mut bytes = 7u64.to_le_bytes().to_vec();
                    bytes.extend_from_slice(&u32::to_le_bytes(segment));
                    bytes.extend_from_slice(&u32::to_le_bytes(begins));
                    bytes.resize(HEAD + len, 0x5a);
                    let filter = PathFilter::parse(&bytes);
                    let is_sound =
                        segment.is_power_of_two() && begins > 0 && (begins % segment == 0) && len == fitting;
                    assert_eq!(filter.is_some(), is_sound, "{segment}, {begins}, {len}");
                    let Some(filter) = filter else { continue };
                    for mixed in [0, 1, u64::MAX, mixed(1), mixed(2), mixed(3)] {
                        let places = filter.places(mixed);
                        assert!(places.into_iter().all(|place| place < begins + 2 * segment), "{places:?}");
                    }
                    let _ = filter.at(begins + 2 * segment - 1);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_filter_or_none(bytes: Vec<u8>, segment: u32, begins: u32) {
            let mut ours = 7u64.to_le_bytes().to_vec();
            for part in [segment, begins] {
                ours.extend_from_slice(&part.to_le_bytes());
            }
            ours.extend_from_slice(&bytes);
            for bytes in [bytes, ours] {
                if let Some(filter) = PathFilter::parse(&bytes) {
                    let _ = filter.may_contain(&hashes(0, 1)[0]);
                }
            }
        }
    }
}
