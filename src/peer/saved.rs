//! Peers that were known before the last restart: a file in the state folder, replaced whole and never half written.
//!
//! What it says is a hint: each peer in it is checked before it is asked for anything.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::interfaces;
use super::record::{Peer, Source};
use super::wire::Announce;

/// The most that is read, in bytes.
const MAX_FILE: u64 = 16 * 1024 * 1024;

#[derive(Serialize, Deserialize)]
struct SavedPeer {
    address: SocketAddr,
    /// The interface of a link-local address, by name: its number is another after a restart of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interface: Option<String>,
    announce: Announce,
}

impl SavedPeer {
    fn of(peer: &Peer) -> Option<Self> {
        // That it once answered an announcement says nothing of the host.
        let announce = Announce { reply: false, ..peer.announce.clone() };
        let (mut address, mut interface) = (peer.address?, None);
        if let SocketAddr::V6(v6) = &mut address
            && v6.scope_id() != 0
        {
            interface = Some(interfaces::name_of(v6.scope_id())?);
            v6.set_scope_id(0);
        }
        Some(Self { address, interface, announce })
    }

    /// Nothing if its interface is gone: there is no way to it then.
    fn place(self) -> Option<(Announce, SocketAddr)> {
        let mut address = self.address;
        if let SocketAddr::V6(v6) = &mut address {
            let index = self.interface.as_deref().map(interfaces::index_of);
            if v6.ip().is_unicast_link_local() || index.is_some() {
                v6.set_scope_id(index??);
            }
        }
        Some((self.announce, address))
    }
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
        Ok(saved) => saved.into_iter().filter_map(SavedPeer::place).collect(),
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
    let saved: Vec<SavedPeer> = of_use.filter_map(SavedPeer::of).collect();
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut beside = tempfile::NamedTempFile::new_in(folder)?;
    beside.write_all(&serde_json::to_vec_pretty(&saved)?)?;
    beside.as_file().sync_all()?;
    beside.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::registry::Registry;
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_link_local_address_keeps_its_interface_by_name_and_replies_are_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(folder.path());
        let mut registry = Registry::new("me".to_owned(), Duration::from_secs(60), 10);
        let index = interfaces::index_of("lo").unwrap();
        let from =
            [format!("[fe80::1%{index}]:9999"), "10.0.0.1:9999".to_owned(), "[fd00::1]:9999".to_owned()];
        for (number, from) in from.iter().enumerate() {
            let announce =
                Announce { id: Some(number.to_string()), port: 80, reply: true, ..Announce::default() };
            registry.announced(announce, from.parse().unwrap(), Source::Announced, Instant::now());
        }
        save(&file, &registry.all()).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(
            text.contains("\"interface\": \"lo\"") && !text.contains("reply") && !text.contains('%'),
            "{text}"
        );
        let addresses = |file: &Path| load(file).iter().map(|(_, at)| at.to_string()).collect::<Vec<_>>();
        let there = format!("[fe80::1%{index}]:80");
        assert_eq!(addresses(&file), [&*there, "10.0.0.1:80", "[fd00::1]:80"]);
        // The interface is gone, or was never written down.
        std::fs::write(&file, text.replace("\"lo\"", "\"gone0\"")).unwrap();
        assert_eq!(addresses(&file), ["10.0.0.1:80", "[fd00::1]:80"]);
        std::fs::write(&file, text.replace("\"interface\"", "\"unknown\"")).unwrap();
        assert_eq!(addresses(&file), ["10.0.0.1:80", "[fd00::1]:80"]);
    }
}
