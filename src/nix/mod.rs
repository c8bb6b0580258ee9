//! The formats of Nix, as pure code.
//!
//! Hash parts and NAR hashes, store paths, narinfo, nix-cache-info, keys and signatures, the paths of a binary cache's
//! URLs, the messages of `nix-store --serve`, and the layout of a NAR. Nothing here may know of tokio, files, sockets
//! or the clock: bytes in, values out, and no input can panic.
//!
//! What security hangs on (hashes, store paths, narinfo, verification) comes from the crates nix-derivation and
//! nix-narinfo; this module is the only place that names them.

pub mod cache_info;
pub mod cache_url;
pub mod hash;
pub mod layout;
pub mod listing;
pub mod nar_text;
pub mod narinfo;
pub mod secret_key;
pub mod serve;
pub mod signature;

pub use hash::{NarHash, StorePathHash};
pub use nix_derivation::{CAHash, StoreDir, StorePath};
pub use signature::{PublicKey, Signature};
