//! The datagrams between peers, as peernix in Go speaks them too: a JSON announcement, and short questions in text.
//!
//! Pure: bytes in, a message or nothing out. What comes from the network is cut to size here, once.

use serde::{Deserialize, Serialize};

use crate::nix::{NarHash, StorePathHash};

/// The largest datagram that is read or sent, in bytes.
pub(super) const MAX_DATAGRAM: usize = 4096;
/// How many paths one datagram can name as gained.
pub(super) const MAX_GAINED: usize = 100;
/// The feature of a host that understands [`Message::Gained`].
pub const FEATURE_GAINED: &str = "gained";
/// The feature of a host that tells what it holds, in the second way to write that: whoever writes the first one is not asked for it.
pub const FEATURE_HOLDINGS: &str = "holdings-2";
/// The longest text in an announcement that is kept, in bytes.
const MAX_TEXT: usize = 256;
/// The most features that are kept.
const MAX_FEATURES: usize = 32;

/// What a host says of itself. Fields that peernix in Go does not know are optional; unknown ones are passed over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Announce {
    /// The version of peernix.
    pub peernix_version: String,
    /// The version of Nix.
    pub nix_version: String,
    /// As Nix names it: `x86_64-linux`.
    pub platform: String,
    /// What the host can do beyond the oldest protocol.
    pub features: Vec<String>,
    /// The public keys that it signs with; shown, never trusted.
    pub public_key: String,
    /// The TCP port of its binary cache.
    pub port: u16,
    /// Which run of which host: how a host knows its own announcements. Peernix in Go has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether it answers an announcement; then it wants no answer itself.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reply: bool,
}

/// One datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// `{"cmd":"announce",…}`
    Announce(Announce),
    /// `{"cmd":"goodbye","id":…}`: the host with this id stops.
    Goodbye(String),
    /// `{"cmd":"gained","paths":[…]}`: paths that were not there before. Without any: too many to name.
    Gained(Vec<StorePathHash>),
    /// `has_path?<hash>`
    HasPath(StorePathHash),
    /// `has_path_with_narhash?<hash>:<narhash>`
    HasPathWithNarHash(StorePathHash, NarHash),
    /// `ping`
    Ping,
    /// `pong`
    Pong,
    /// `yes`
    Yes,
    /// `narhash_mismatch`
    NarHashMismatch,
    /// `not_found`
    NotFound,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
enum Json {
    Announce(Announce),
    Goodbye { id: String },
    Gained { paths: Vec<String> },
}

impl Message {
    /// Reads a datagram. `None`: not one of ours.
    #[must_use]
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        if datagram.len() > MAX_DATAGRAM {
            return None;
        }
        let text = std::str::from_utf8(datagram).ok()?.trim();
        if text.starts_with('{') {
            return match serde_json::from_str(text).ok()? {
                Json::Announce(announce) => announce.cut().map(Self::Announce),
                Json::Goodbye { id } => is_id(&id).then_some(Self::Goodbye(id)),
                Json::Gained { paths } => {
                    let hashes = paths.iter().map(|path| StorePathHash::parse(path.as_bytes()).ok());
                    hashes.collect::<Option<_>>().map(Self::Gained)
                }
            };
        }
        if let Some(hash) = text.strip_prefix("has_path?") {
            return StorePathHash::parse(hash.as_bytes()).ok().map(Self::HasPath);
        }
        if let Some(both) = text.strip_prefix("has_path_with_narhash?") {
            let (hash, nar_hash) = both.split_once(':')?;
            let nar_hash = NarHash::parse_base32(nar_hash.as_bytes()).or_else(|_| NarHash::parse(nar_hash));
            let hash = StorePathHash::parse(hash.as_bytes()).ok()?;
            return Some(Self::HasPathWithNarHash(hash, nar_hash.ok()?));
        }
        match text {
            "ping" => Some(Self::Ping),
            "pong" => Some(Self::Pong),
            "yes" => Some(Self::Yes),
            "narhash_mismatch" => Some(Self::NarHashMismatch),
            "not_found" => Some(Self::NotFound),
            _ => None,
        }
    }

    /// Writes it.
    #[must_use]
    pub fn to_datagram(&self) -> Vec<u8> {
        let json = |json: &Json| serde_json::to_vec(json).unwrap_or_default();
        match self {
            Self::Announce(announce) => json(&Json::Announce(announce.clone())),
            Self::Goodbye(id) => json(&Json::Goodbye { id: id.clone() }),
            Self::Gained(hashes) => {
                json(&Json::Gained { paths: hashes.iter().map(ToString::to_string).collect() })
            }
            Self::HasPath(hash) => format!("has_path?{hash}").into_bytes(),
            Self::HasPathWithNarHash(hash, nar_hash) => {
                format!("has_path_with_narhash?{hash}:{nar_hash}").into_bytes()
            }
            Self::Ping => b"ping".to_vec(),
            Self::Pong => b"pong".to_vec(),
            Self::Yes => b"yes".to_vec(),
            Self::NarHashMismatch => b"narhash_mismatch".to_vec(),
            Self::NotFound => b"not_found".to_vec(),
        }
    }
}

impl Announce {
    /// Whether the host says that it can do this.
    pub(super) fn has_feature(&self, feature: &str) -> bool {
        self.features.iter().any(|known| known == feature)
    }

    /// Cuts what a stranger wrote to its bounds. `None`: without a port, or with an id that is none.
    fn cut(mut self) -> Option<Self> {
        if self.port == 0 || self.id.as_deref().is_some_and(|id| !is_id(id)) {
            return None;
        }
        self.features.truncate(MAX_FEATURES);
        let texts =
            [&mut self.peernix_version, &mut self.nix_version, &mut self.platform, &mut self.public_key];
        for text in texts.into_iter().chain(&mut self.features) {
            text.retain(|c| !c.is_control());
            let mut end = text.len().min(MAX_TEXT);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
        }
        Some(self)
    }
}

/// Instance ids are 16 hexadecimal digits.
fn is_id(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_announcement_of_peernix_in_go_is_read() {
        let text = br#"{"cmd":"announce","peernix_version":"0.3","nix_version":"nix (Nix) 2.18","platform":"x86_64-linux",
            "features":["narhash"],"public_key":"a:b","port":9999,"unknown":{"x":[1]}}"#;
        let Some(Message::Announce(announce)) = Message::parse(text) else { panic!() };
        assert_eq!((announce.port, announce.id, announce.reply), (9999, None, false));
        assert_eq!(announce.features, ["narhash"]);
    }

    #[test]
    fn what_has_no_port_or_a_strange_id_is_not_read() {
        for text in [
            r#"{"cmd":"announce"}"#,
            r#"{"cmd":"announce","port":0}"#,
            r#"{"cmd":"announce","port":70000}"#,
            r#"{"cmd":"announce","port":1,"id":"../../x"}"#,
            r#"{"cmd":"goodbye","id":""}"#,
            r#"{"cmd":"reboot"}"#,
            "has_path?",
            "has_path?eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee",
            "",
        ] {
            assert_eq!(Message::parse(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_message_survives_its_datagram(
            version in "[ -~]{0,40}", features in prop::collection::vec("[a-z]{1,9}", 0..5), port in 1u16..,
            id in prop::option::of("[0-9a-f]{16}"), reply: bool, part in "[0-9a-df-np-sv-z]{32}", digest: [u8; 32],
        ) {
            let version = version.trim().to_owned();
            let announce = Announce {
                peernix_version: version.clone(), nix_version: version, platform: "x86_64-linux".to_owned(),
                features, public_key: "a:b".to_owned(), port, id, reply,
            };
            let hash = StorePathHash::parse(part.as_bytes()).unwrap();
            let nar_hash = NarHash::from_digest(digest);
            for message in [
                Message::Announce(announce), Message::Goodbye("0123456789abcdef".to_owned()), Message::HasPath(hash), Message::Gained(vec![hash; MAX_GAINED]),
                Message::HasPathWithNarHash(hash, nar_hash), Message::Ping, Message::Pong, Message::Yes,
                Message::NarHashMismatch, Message::NotFound,
            ] {
                prop_assert_eq!(Message::parse(&message.to_datagram()), Some(message));
            }
        }

        #[test]
        fn any_bytes_are_a_message_or_nothing(bytes: Vec<u8>, text in "\\{\"cmd\":\"announce\",.{0,60}\\}") {
            let _ = Message::parse(&bytes);
            let _ = Message::parse(text.as_bytes());
        }

        #[test]
        fn what_is_kept_of_a_stranger_is_bounded(text in ".{0,900}", count in 0usize..60) {
            let announce = Announce { platform: text.clone(), features: vec![text; count], port: 1, ..Announce::default() };
            let kept = announce.cut().unwrap();
            prop_assert!(kept.platform.len() <= MAX_TEXT && kept.features.len() <= MAX_FEATURES);
            prop_assert!(kept.features.iter().all(|feature| feature.len() <= MAX_TEXT));
        }
    }
}
