//! Signatures and the public keys that verify them: `name:base64`.
//!
//! Both types are nix-narinfo's; verification is strict Ed25519 (no malleable signatures, no weak keys).

pub use nix_narinfo::{NixSignature as Signature, TrustedPublicKey as PublicKey};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Writes a public key as Nix does in `trusted-public-keys`: `name:base64`.
#[must_use]
pub fn public_key_text(key: &PublicKey) -> String {
    format!("{}:{}", key.name, STANDARD.encode(key.key.as_bytes()))
}
