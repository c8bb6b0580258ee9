//! Secret keys in Nix's file format, `name:base64(seed, public key)`, and the raw form of peernix in Go.
//!
//! A secret never leaves this type but as a signature or, for the file that keeps it, by [`SecretKey::to_file_text`].

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signer as _, SigningKey};
use thiserror::Error;

use super::signature::{PublicKey, Signature};

/// Why a text or file is not a secret key.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SecretKeyError {
    /// No `name:` in front.
    #[error("a secret key reads name:base64, and there is no `:` in this one")]
    MissingName,
    /// The name is empty or has characters that would break a narinfo or nix.conf.
    #[error("the key name {0:?} is empty, or has spaces, colons or control characters")]
    InvalidName(String),
    /// What follows the name is not base64.
    #[error("what follows the key name is not base64")]
    InvalidBase64,
    /// Not 64 bytes.
    #[error("the key has {got} bytes where 64 belong{}", if *.got == 32 { "; this looks like a public key" } else { "" })]
    InvalidLength {
        /// How many bytes there were.
        got: usize,
    },
    /// The second half is not the public key of the first.
    #[error("the two halves of the key do not belong together: the file is damaged")]
    Mismatch,
}

/// A key that signs store paths.
pub struct SecretKey {
    name: String,
    key: SigningKey,
}

impl SecretKey {
    /// Makes a key of 32 random bytes. The caller brings the randomness: this module has no I/O.
    pub fn from_seed(name: &str, seed: [u8; 32]) -> Result<Self, SecretKeyError> {
        check_name(name)?;
        Ok(Self { name: name.to_owned(), key: SigningKey::from_bytes(&seed) })
    }

    /// Reads Nix's file format; white space around it is passed over.
    pub fn parse(text: &str) -> Result<Self, SecretKeyError> {
        let (name, encoded) = text.trim().split_once(':').ok_or(SecretKeyError::MissingName)?;
        check_name(name)?;
        let bytes = STANDARD.decode(encoded).map_err(|_| SecretKeyError::InvalidBase64)?;
        Self::from_raw(name, &bytes)
    }

    /// Reads the raw 64 bytes (seed, public key) that peernix in Go kept; they carry no name.
    pub fn from_raw(name: &str, bytes: &[u8]) -> Result<Self, SecretKeyError> {
        check_name(name)?;
        let pair: &[u8; 64] =
            bytes.try_into().map_err(|_| SecretKeyError::InvalidLength { got: bytes.len() })?;
        let key = SigningKey::from_keypair_bytes(pair).map_err(|_| SecretKeyError::Mismatch)?;
        Ok(Self { name: name.to_owned(), key })
    }

    /// The same key under another name.
    pub fn renamed(self, name: &str) -> Result<Self, SecretKeyError> {
        check_name(name)?;
        Ok(Self { name: name.to_owned(), key: self.key })
    }

    /// The name that stands in front of its signatures.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first eight hexadecimal digits of the public key: what makes the name of a generated key unique.
    #[must_use]
    pub fn short_id(&self) -> String {
        let bytes = self.key.verifying_key().to_bytes();
        bytes[..4].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The public half.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        PublicKey { name: self.name.clone(), key: self.key.verifying_key() }
    }

    /// Signs a fingerprint.
    #[must_use]
    pub fn sign(&self, fingerprint: &str) -> Signature {
        let signature = self.key.sign(fingerprint.as_bytes());
        Signature { key_name: self.name.clone(), encoded: STANDARD.encode(signature.to_bytes()) }
    }

    /// The text of the key file, as `nix-store --generate-binary-cache-key` writes it.
    #[must_use]
    pub fn to_file_text(&self) -> String {
        format!("{}:{}", self.name, STANDARD.encode(self.key.to_keypair_bytes()))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({}, …)", self.name)
    }
}

fn check_name(name: &str) -> Result<(), SecretKeyError> {
    let good = |c: char| !c.is_whitespace() && !c.is_control() && c != ':';
    if name.is_empty() || !name.chars().all(good) {
        return Err(SecretKeyError::InvalidName(name.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_public_key_is_recognised_as_such() {
        let public =
            crate::nix::signature::public_key_text(&SecretKey::from_seed("a", [7; 32]).unwrap().public_key());
        let error = SecretKey::parse(&public).unwrap_err();
        assert!(error.to_string().contains("looks like a public key"), "{error}");
    }

    #[test]
    fn halves_of_two_keys_are_refused() {
        let one = SecretKey::from_seed("a", [1; 32]).unwrap().key.to_keypair_bytes();
        let two = SecretKey::from_seed("a", [2; 32]).unwrap().key.to_keypair_bytes();
        let mixed = [&one[..32], &two[32..]].concat();
        assert_eq!(SecretKey::from_raw("a", &mixed).unwrap_err(), SecretKeyError::Mismatch);
    }

    #[test]
    fn debug_keeps_the_secret() {
        let key = SecretKey::from_seed("a", [1; 32]).unwrap();
        assert_eq!(format!("{key:?}"), "SecretKey(a, …)");
    }

    proptest! {
        #[test]
        fn any_key_survives_its_file(seed: [u8; 32], name in "[!-9;-~]{1,40}") {
            let key = SecretKey::from_seed(&name, seed).unwrap();
            let again = SecretKey::parse(&format!("{}\n", key.to_file_text())).unwrap();
            prop_assert_eq!(again.to_file_text(), key.to_file_text());
            let signature = again.sign("1;text");
            prop_assert!(signature.verify(b"1;text", &[key.public_key()]).unwrap());
            prop_assert!(!signature.verify(b"1;texu", &[key.public_key()]).unwrap());
        }

        #[test]
        fn any_text_is_a_key_or_an_error(text: String, bytes: Vec<u8>) {
            let _ = SecretKey::parse(&text);
            let _ = SecretKey::parse(&format!("name:{text}"));
            let _ = SecretKey::from_raw("name", &bytes);
            let _ = PublicKey::parse(&text);
            let _ = Signature::parse(&text);
        }
    }
}
