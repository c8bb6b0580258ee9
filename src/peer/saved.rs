//! Peers that were known before the last restart: a file in the state folder, replaced whole and never half written.
//!
//! What it says is a hint: each peer in it is checked before it is asked for anything.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::registry::{Peer, Source};
use super::wire::Announce;

/// The most that is read, in bytes.
const MAX_FILE: u64 = 16 * 1024 * 1024;

#[derive(Serialize, Deserialize)]
struct SavedPeer {
    address: SocketAddr,
    announce: Announce,
}

/// Where the file lies in the state folder.
pub(super) fn file(state: &Path) -> PathBuf {
    state.join("peers.json")
}

/// Reads the file. A file that is missing or damaged is an empty one.
pub(super) fn load(file: &Path) -> Vec<(Announce, SocketAddr)> {
    use std::io::Read as _;
    let mut text = String::new();
    let read = std::fs::File::open(file).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    if read.is_err() {
        return Vec::new();
    }
    match serde_json::from_str::<Vec<SavedPeer>>(&text) {
        Ok(saved) => saved.into_iter().map(|peer| (peer.announce, peer.address)).collect(),
        Err(error) => {
            let file = file.display();
            tracing::warn!(%file, %error, "the known peers can't be read; they are found anew");
            Vec::new()
        }
    }
}

/// Writes the file: beside it first, then in its place.
pub(super) fn save(file: &Path, peers: &[Peer]) -> std::io::Result<()> {
    // Without an id nobody could tell later whether it is still the same.
    let of_use = peers.iter().filter(|peer| peer.source != Source::Configured && peer.announce.id.is_some());
    let saved: Vec<SavedPeer> = of_use
        .filter_map(|peer| Some(SavedPeer { address: peer.address?, announce: peer.announce.clone() }))
        .collect();
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut beside = tempfile::NamedTempFile::new_in(folder)?;
    beside.write_all(&serde_json::to_vec_pretty(&saved)?)?;
    beside.as_file().sync_all()?;
    beside.persist(file)?;
    Ok(())
}
