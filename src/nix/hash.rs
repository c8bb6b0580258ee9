//! The two hashes that name things in a binary cache: the hash part of a store path, and the hash of a NAR.
//!
//! Both are parsed once, at the door, and are plain bytes inside: comparing them is comparing bytes.

use std::fmt;

use nix_derivation::{NixHash, StorePath, nixbase32};
use thiserror::Error;

/// Why a text is not a hash.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HashError {
    /// Not as many characters as the hash has.
    #[error("{got} characters where {expected} of nixbase32 belong")]
    Length {
        /// How many characters the hash has.
        expected: usize,
        /// How many there were.
        got: usize,
    },
    /// A character outside of nixbase32 (which has no e, o, t, u), or bits behind the last byte.
    #[error("not nixbase32: {0}")]
    Encoding(String),
    /// A hash, but not of the algorithm that Nix uses for NARs.
    #[error("not a sha256 hash: {0:?}")]
    Algorithm(String),
}

fn decode<const N: usize>(text: &[u8]) -> Result<[u8; N], HashError> {
    let expected = nixbase32::encoded_len(N);
    if text.len() != expected {
        return Err(HashError::Length { expected, got: text.len() });
    }
    let bytes = nixbase32::decode(text).map_err(|error| HashError::Encoding(error.to_string()))?;
    bytes.try_into().map_err(|_| HashError::Length { expected, got: text.len() })
}

/// The hash part of a store path: 20 bytes, 32 characters of nixbase32.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePathHash([u8; 20]);

impl StorePathHash {
    /// How many characters the hash part has in a name.
    pub const CHARACTERS: usize = 32;

    /// Reads the 32 characters of a hash part.
    pub fn parse(text: &[u8]) -> Result<Self, HashError> {
        decode(text).map(Self)
    }

    /// The hash part of a store path.
    #[must_use]
    pub fn of(path: &StorePath) -> Self {
        Self(*path.digest())
    }

    /// How many bytes it has.
    pub const BYTES: usize = 20;

    /// From its bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Display for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&nixbase32::encode(&self.0))
    }
}

impl fmt::Debug for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorePathHash({self})")
    }
}

/// The SHA-256 of a NAR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NarHash([u8; 32]);

impl NarHash {
    /// How many characters the hash has in nixbase32, without `sha256:`.
    pub const CHARACTERS: usize = 52;

    /// From the digest itself.
    #[must_use]
    pub fn from_digest(digest: [u8; 32]) -> Self {
        Self(digest)
    }

    /// Reads any form that Nix writes: `sha256:` with nixbase32, base16 or base64, or SRI (`sha256-…`).
    pub fn parse(text: &str) -> Result<Self, HashError> {
        match NixHash::parse(text) {
            Ok(NixHash::Sha256(digest)) => Ok(Self(digest)),
            Ok(_) => Err(HashError::Algorithm(text.to_owned())),
            Err(error) => Err(HashError::Encoding(error.to_string())),
        }
    }

    /// Reads the 52 characters of nixbase32 alone, as they stand in a URL.
    pub fn parse_base32(text: &[u8]) -> Result<Self, HashError> {
        decode(text).map(Self)
    }

    /// The 52 characters of nixbase32 alone.
    #[must_use]
    pub fn to_base32(&self) -> String {
        nixbase32::encode(&self.0)
    }

    pub(crate) fn to_nix(self) -> NixHash {
        NixHash::Sha256(self.0)
    }
}

impl fmt::Display for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_base32())
    }
}

impl fmt::Debug for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NarHash({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    #[test]
    fn a_nar_hash_reads_every_form_of_nix() {
        // From `nix-hash --type sha256 --base32|--base16 --flat` and `nix hash to-sri` of an empty file.
        let base32 = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
        let forms = [
            base32,
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=",
        ];
        for form in forms {
            let hash = NarHash::parse(form).unwrap();
            assert_eq!(hash.to_string(), base32);
            assert_eq!(hash, NarHash::from_digest(Sha256::digest(b"").into()));
        }
        assert!(matches!(
            NarHash::parse("md5:d41d8cd98f00b204e9800998ecf8427e"),
            Err(HashError::Algorithm(_))
        ));
    }

    #[test]
    fn letters_that_nixbase32_lacks_are_refused() {
        for letter in ["e", "o", "t", "u", "A", "é"] {
            let text = letter.repeat(32);
            assert!(StorePathHash::parse(&text.as_bytes()[..32]).is_err(), "{letter}");
        }
    }

    proptest! {
        #[test]
        fn any_digest_survives_its_text(digest: [u8; 32], part: [u8; 20]) {
            let hash = NarHash::from_digest(digest);
            prop_assert_eq!(NarHash::parse(&hash.to_string()).unwrap(), hash);
            prop_assert_eq!(NarHash::parse_base32(hash.to_base32().as_bytes()).unwrap(), hash);
            let part = StorePathHash(part);
            prop_assert_eq!(StorePathHash::parse(part.to_string().as_bytes()).unwrap(), part);
        }

        #[test]
        fn any_bytes_are_a_hash_or_an_error(bytes: Vec<u8>, text: String) {
            let _ = StorePathHash::parse(&bytes);
            let _ = NarHash::parse_base32(&bytes);
            let _ = NarHash::parse(&text);
        }
    }
}
