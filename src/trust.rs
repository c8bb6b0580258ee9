//! Whom this host believes: the configured public keys and those of its own Nix, and what they prove.
//!
//! The invariant: a [`TrustedNarInfo`] is made here alone, from a narinfo that a trusted key has signed or whose
//! content address proves it. A key that a peer merely announces never comes in.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use thiserror::Error;
use tokio::process::Command;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::nix::narinfo::{ContentAddressProof, NarInfo};
use crate::nix::{PublicKey, StoreDir};

/// How long Nix may take to tell its configuration.
const ASK_TIME: Duration = Duration::from_secs(10);
/// How often it is looked whether nix.conf has changed.
const WATCH_PERIOD: Duration = Duration::from_secs(2);

/// `[trust]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Public keys, as in nix.conf: `name:base64`. Narinfos of peers that one of them signed are passed on. Default: none
    /// but those of the host's own Nix.
    pub public_keys: Vec<String>,
    /// Whether the keys that the host's own Nix trusts are trusted here too. Default true.
    pub host_keys: bool,
    /// What becomes of a peer's narinfo that nobody trusted has signed: `refuse` it, or `relay` it and leave the check to the
    /// client. Default: refuse.
    pub unsigned: Unsigned,
    /// Whether a verified narinfo gets our own signature too, so that the clients of this host need one key. Default true.
    pub resign: bool,
}

/// What becomes of what nobody trusted has signed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unsigned {
    /// It is not passed on.
    #[default]
    Refuse,
    /// It is passed on as it is, never with our signature.
    Relay,
}

impl Default for Options {
    fn default() -> Self {
        Self { public_keys: Vec::new(), host_keys: true, unsigned: Unsigned::default(), resign: true }
    }
}

impl Options {
    /// What can't be read, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        for (position, key) in self.public_keys.iter().enumerate() {
            PublicKey::parse(key).map_err(|error| {
                // Never the whole text: it may be a secret key that came here by mistake.
                let name = key.split_once(':').map(|(name, _)| format!(" ({name}:…)")).unwrap_or_default();
                format!(
                    "trust.public_keys: entry {}{name} is no public key ({error}); a public key reads NAME:BASE64, \
                     each in a string of its own",
                    position + 1
                )
            })?;
        }
        Ok(())
    }
}

/// Why a narinfo of a peer is not believed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Untrusted {
    /// No signature by a key that is trusted here.
    #[error("no trusted key has signed it")]
    NoSignature,
    /// A content address that does not lead to the path.
    #[error("its content address leads to another path")]
    WrongContentAddress,
    /// It can't be put into the form that is signed.
    #[error("it can't be checked: {0}")]
    Malformed(String),
}

/// What makes a narinfo trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A trusted key signed all of it.
    Signature,
    /// The content address is that of the path: the client checks the contents by it.
    ContentAddress,
    /// Nothing; the configuration leaves it to the client.
    LeftToClient,
}

/// A narinfo that may be passed on.
#[derive(Clone, Debug)]
pub struct TrustedNarInfo {
    narinfo: NarInfo,
    proof: Proof,
}

impl TrustedNarInfo {
    /// What it says.
    #[must_use]
    pub fn narinfo(&self) -> &NarInfo {
        &self.narinfo
    }

    /// Whether our own signature may stand under it. A content address proves the path, and NarHash at best, but never
    /// NarSize, which a signature vouches for too.
    #[must_use]
    pub fn may_be_signed(&self) -> bool {
        self.proof == Proof::Signature
    }
}

/// The keys that are trusted now. Cheap to clone: all clones are one.
#[derive(Clone, Debug)]
pub struct Trust {
    options: Arc<Options>,
    store_dir: StoreDir,
    keys: Arc<RwLock<Arc<[PublicKey]>>>,
}

impl Trust {
    /// Trusts the configured keys and `own`; those of the host's Nix come with [`Trust::ask_nix`].
    #[must_use]
    pub fn new(options: Options, own: Vec<PublicKey>, store_dir: StoreDir) -> Self {
        let keys = each_once(&options.public_keys, &[], &own);
        Self { options: Arc::new(options), store_dir, keys: Arc::new(RwLock::new(keys)) }
    }

    /// Whether verified narinfos get our own signature.
    #[must_use]
    pub fn resigns(&self) -> bool {
        self.options.resign
    }

    /// The names of the keys that are trusted now.
    #[must_use]
    pub fn key_names(&self) -> Vec<String> {
        self.keys().iter().map(|key| key.name.clone()).collect()
    }

    /// Whether one of these keys is trusted: `name:base64` each, separated by spaces, as a host announces its own.
    #[must_use]
    pub fn trusts_any(&self, announced: &str) -> bool {
        let trusted = self.keys();
        announced.split(' ').filter_map(|key| PublicKey::parse(key).ok()).any(|key| trusted.contains(&key))
    }

    /// Believes a narinfo, or says why not.
    pub fn verify(&self, narinfo: NarInfo) -> Result<TrustedNarInfo, Untrusted> {
        let signed = narinfo.info.is_signed_by(&self.keys(), &self.store_dir);
        let proof = if signed.map_err(|error| Untrusted::Malformed(error.to_string()))? {
            Proof::Signature
        } else {
            match narinfo.info.content_address_proof(&self.store_dir) {
                ContentAddressProof::Path => Proof::ContentAddress,
                ContentAddressProof::OtherPath => return Err(Untrusted::WrongContentAddress),
                ContentAddressProof::Absent if self.options.unsigned == Unsigned::Relay => {
                    Proof::LeftToClient
                }
                ContentAddressProof::Absent => return Err(Untrusted::NoSignature),
            }
        };
        Ok(TrustedNarInfo { narinfo, proof })
    }

    /// Follows the host's own Nix: asks for its keys now, and again whenever nix.conf changes. Ends when dropped.
    pub async fn follow_nix(self, own: Vec<PublicKey>) {
        let mut seen = None;
        let mut ticks = interval(WATCH_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now: Vec<Option<SystemTime>> =
                configuration_files().iter().map(|file| modified(file)).collect();
            if seen.as_ref() != Some(&now) {
                self.ask_nix(&own).await;
                seen = Some(now);
            }
        }
    }

    /// Asks the host's own Nix which keys it trusts. If it does not say, those that were trusted stay.
    pub async fn ask_nix(&self, own: &[PublicKey]) {
        if !self.options.host_keys {
            return;
        }
        match trusted_public_keys().await {
            Some(texts) => {
                let keys = each_once(&self.options.public_keys, &texts, own);
                let names: Vec<&str> = keys.iter().map(|key| &*key.name).collect();
                tracing::info!(keys = names.join(" "), "trusting");
                *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
            }
            None => tracing::warn!("Nix does not tell which keys it trusts; only trust.public_keys are"),
        }
    }

    fn keys(&self) -> Arc<[PublicKey]> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The configured keys, those of the host's Nix, and our own. Nix often lists our own as well: one is enough.
fn each_once(configured: &[String], of_nix: &[String], own: &[PublicKey]) -> Arc<[PublicKey]> {
    let parsed = configured.iter().chain(of_nix).filter_map(|key| PublicKey::parse(key).ok());
    let mut keys: Vec<PublicKey> = Vec::new();
    for key in parsed.chain(own.iter().cloned()) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys.into()
}

fn modified(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file).and_then(|meta| meta.modified()).ok()
}

/// Where the settings of the host's Nix lie; files that they include are seen at the next change of these.
fn configuration_files() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let system = variable("NIX_CONF_DIR").unwrap_or_else(|| "/etc/nix".into());
    let home = || Some(variable("HOME")?.join(".config"));
    let user = variable("XDG_CONFIG_HOME").or_else(home).map(|folder| folder.join("nix/nix.conf"));
    let mut files = vec![system.join("nix.conf"), system.join("nix.custom.conf")];
    files.extend(user);
    files
}

/// `trusted-public-keys`, as the Nix of this host says. Newer ones call the command differently.
async fn trusted_public_keys() -> Option<Vec<String>> {
    for command in [&["show-config", "--json"][..], &["config", "show", "--json"]] {
        let mut nix = Command::new("nix");
        nix.args(["--extra-experimental-features", "nix-command"]).args(command);
        nix.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let Ok(Ok(output)) = timeout(ASK_TIME, nix.output()).await else { continue };
        let Ok(settings) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else { continue };
        let Some(keys) = settings["trusted-public-keys"]["value"].as_array() else { continue };
        return Some(keys.iter().filter_map(|key| key.as_str().map(str::to_owned)).collect());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_listed_several_times_is_trusted_once() {
        let base64 = "6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";
        let texts = [format!("lan-1:{base64}"), "no key".to_owned(), format!("lan-2:{base64}")];
        let own = [PublicKey::parse(&texts[0]).unwrap()];
        let keys = each_once(&texts[..1], &texts, &own);
        assert_eq!(keys.iter().map(|key| &*key.name).collect::<Vec<_>>(), ["lan-1", "lan-2"]);
    }
}
