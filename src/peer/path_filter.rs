//! A filter of paths: whether somebody may have one of them.
//!
//! Pure. It says "maybe" or "no", and its "no" holds for every path that it was made from. What comes from the network is
//! checked here once: no bytes can make a question fail.

use bytes::{Buf as _, Bytes};
use xorf::{BinaryFuse8, BinaryFuse8Ref, DmaSerializable as _, Filter as _, FilterRef as _};

use crate::nix::StorePathHash;

/// What is written before the fingerprints, in bytes.
const DESCRIPTOR: usize = BinaryFuse8::DESCRIPTOR_LEN;
/// Paths that a filter is made of, at most; so many take two megabytes.
const MAX_PATHS: usize = 2 * 1024 * 1024;

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
        if keys.len() > MAX_PATHS {
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

    /// Reads one: its descriptor, and all that follows. `None`: it is none.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (descriptor, fingerprints) = bytes.split_first_chunk()?;
        // A copy: a part of the message would keep all of it.
        let filter = Self { descriptor: *descriptor, fingerprints: Bytes::copy_from_slice(fingerprints) };
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

    /// As it is written.
    pub(super) fn descriptor(&self) -> &[u8] {
        &self.descriptor
    }

    /// As they are written.
    pub(super) fn fingerprints(&self) -> &[u8] {
        &self.fingerprints
    }

    /// Its length as it is written, in bytes.
    pub(super) fn weight(&self) -> usize {
        DESCRIPTOR + self.fingerprints.len()
    }
}

/// The first bits of what is a hash already.
fn key(hash: &StorePathHash) -> u64 {
    hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
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
        assert!(wrong < 500, "{wrong}");
        let bits = filter.weight() as f64 * 8.0 / here.len() as f64;
        assert!(bits < 10.0, "{bits}");
    }

    proptest! {
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
            if let Some(filter) = PathFilter::parse(&bytes) {
                for hash in hashes(0, 200) {
                    let _ = filter.may_contain(&hash);
                }
            }
        }
    }
}
