//! Our own keys: read from their files or made at first start, and the signatures that they make.
//!
//! Secrets stay in here. Knows nothing of stores or HTTP.

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use crate::nix::secret_key::{SecretKey, SecretKeyError};
use crate::nix::signature::public_key_text;
use crate::nix::{PublicKey, Signature};

/// The key file below the state folder that is made at first start.
const OWN_KEY: &str = "secret-key";
/// The largest key file that is read, in bytes: a key has about 100.
const MAX_KEY_FILE: u64 = 4096;

/// `[signing]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Secret key files, in Nix's format or the raw one of peernix in Go. Paths are signed with each. Default: none,
    /// and one is made in the state folder at first start.
    pub keys: Vec<PathBuf>,
}

impl Options {
    /// What is out of range, as `key: why`.
    pub fn check(&self) -> Result<(), String> {
        match self.keys.iter().find(|path| !path.is_absolute()) {
            Some(path) => Err(format!("signing.keys: {} is not an absolute path", path.display())),
            None => Ok(()),
        }
    }

    /// The key files that every user of this machine may read. A group is none of our business; and where systemd hands a
    /// key over by an access list, the mode shows a group that may read.
    pub fn open_to_all(&self) -> impl Iterator<Item = &Path> {
        let is_open =
            |path: &&Path| path.metadata().is_ok_and(|found| found.permissions().mode() & 0o004 != 0);
        self.keys.iter().map(PathBuf::as_path).filter(is_open)
    }
}

/// Why there is no key to sign with. Each message names the file.
#[derive(Debug, Error)]
pub enum SigningError {
    /// The file can't be read.
    #[error("the key file {path} can't be read: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// What is in it is no key.
    #[error("the key file {path} holds no secret key: {source}")]
    Invalid {
        /// Which.
        path: PathBuf,
        /// Why.
        source: SecretKeyError,
    },
    /// A key can't have this name.
    #[error(transparent)]
    Name(SecretKeyError),
    /// Two files hold keys of one name, of which Nix would keep only the first.
    #[error(
        "two keys are named {name}, the second one in {path}: Nix trusts one key of a name, so rename one"
    )]
    SameName {
        /// The name.
        name: String,
        /// The second file.
        path: PathBuf,
    },
    /// The file can't be written.
    #[error("the key file {path} can't be written: {source}{}", advice(source))]
    Write {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The system has no randomness to give.
    #[error("the system gives no random bytes: {0}")]
    Random(String),
}

/// What to do about a file that can't be written, where it is known.
fn advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::AlreadyExists => "; no key is overwritten: name another file, or move this one away",
        ErrorKind::NotFound => "; make its folder first",
        ErrorKind::PermissionDenied => "; name a folder that you may write to, or use sudo",
        _ => "",
    }
}

/// Signs store paths with each of our keys.
#[derive(Debug)]
pub struct Signer {
    keys: Vec<SecretKey>,
}

impl Signer {
    /// Reads the keys that the configuration names, or our own from the state folder, which is made if it is not there.
    pub fn load(options: &Options, state: &Path) -> Result<Self, SigningError> {
        if options.keys.is_empty() {
            let path = state.join(OWN_KEY);
            if !path.exists() {
                let key = generate(None)?;
                match write_new(&path, &key) {
                    Ok(()) => {
                        tracing::info!(key = key.name(), file = %path.display(), "made a key to sign with")
                    }
                    // Another daemon on this folder came first: both have that key.
                    Err(SigningError::Write { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                }
            }
            return Ok(Self { keys: vec![read(&path)?] });
        }
        Self::read(options)
    }

    /// Reads our own key from the state folder, and makes none. `None`: there is none yet, or not for whoever asks.
    pub fn own(state: &Path) -> Result<Option<Self>, SigningError> {
        match read(&state.join(OWN_KEY)) {
            Ok(key) => Ok(Some(Self { keys: vec![key] })),
            Err(SigningError::Read { source, .. })
                if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the keys that the configuration names, and makes none.
    pub fn read(options: &Options) -> Result<Self, SigningError> {
        let mut keys: Vec<SecretKey> = Vec::new();
        for path in &options.keys {
            let key = read(path)?;
            if keys.iter().any(|other| other.name() == key.name()) {
                return Err(SigningError::SameName { name: key.name().to_owned(), path: path.clone() });
            }
            keys.push(key);
        }
        Ok(Self { keys })
    }

    /// A signature by each key.
    #[must_use]
    pub fn sign(&self, fingerprint: &str) -> Vec<Signature> {
        self.keys.iter().map(|key| key.sign(fingerprint)).collect()
    }

    /// The public halves.
    #[must_use]
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.keys.iter().map(SecretKey::public_key).collect()
    }

    /// The public halves as they stand in nix.conf, separated by spaces.
    #[must_use]
    pub fn public_key_line(&self) -> String {
        let texts: Vec<_> = self.public_keys().iter().map(public_key_text).collect();
        texts.join(" ")
    }
}

/// Makes a key. Without a name it gets `<hostname>-<8 hex digits>`, which no other host has.
pub fn generate(name: Option<&str>) -> Result<SecretKey, SigningError> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| SigningError::Random(error.to_string()))?;
    match name {
        Some(name) => SecretKey::from_seed(name, seed).map_err(SigningError::Name),
        None => {
            let key = SecretKey::from_seed("new", seed).map_err(SigningError::Name)?;
            with_unique_name(key).map_err(SigningError::Name)
        }
    }
}

/// Writes a key to a file that was not there before, readable by its owner alone. Whole or not at all: half a key would
/// be taken for a damaged one at the next start.
pub fn write_new(path: &Path, key: &SecretKey) -> Result<(), SigningError> {
    let failed = |source| SigningError::Write { path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::metadata(folder).map_err(failed)?;
    // Its own error names the file beside, which says nothing to whoever named this one.
    let beside = tempfile::NamedTempFile::new_in(folder);
    let mut beside = beside.map_err(|error| failed(std::io::Error::from(error.kind())))?;
    // Nix writes no line end behind a key.
    beside.write_all(key.to_file_text().as_bytes()).map_err(failed)?;
    beside.as_file().sync_all().map_err(failed)?;
    beside.persist_noclobber(path).map_err(|error| failed(error.error))?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

fn read(path: &Path) -> Result<SecretKey, SigningError> {
    let failed = |source| SigningError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, MAX_KEY_FILE), &mut bytes).map_err(failed)?;
    let invalid = |source| SigningError::Invalid { path: path.to_owned(), source };
    // A key of peernix in Go has 64 bytes and no name; Nix's format is longer and has a colon.
    if bytes.len() == 64 && !bytes.contains(&b':') || SecretKey::from_raw("raw", &bytes).is_ok() {
        let key = SecretKey::from_raw("raw", &bytes).and_then(with_unique_name);
        return key.map_err(invalid);
    }
    let text = String::from_utf8(bytes).map_err(|_| invalid(SecretKeyError::MissingName))?;
    SecretKey::parse(&text).map_err(invalid)
}

fn with_unique_name(key: SecretKey) -> Result<SecretKey, SecretKeyError> {
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy();
    let usable = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    let host: String = host.chars().filter(|&c| usable(c)).collect();
    let host = if host.is_empty() { "host" } else { &host };
    let name = format!("{host}-{}", key.short_id());
    key.renamed(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(keys: &[&Path]) -> Options {
        Options { keys: keys.iter().map(|path| path.to_path_buf()).collect() }
    }

    #[test]
    fn a_key_is_made_once_and_is_its_owners_alone() {
        let state = tempfile::tempdir().unwrap();
        let first = Signer::load(&Options::default(), state.path()).unwrap();
        let again = Signer::load(&Options::default(), state.path()).unwrap();
        assert_eq!(first.public_key_line(), again.public_key_line());
        let mode = state.path().join(OWN_KEY).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn two_hosts_never_make_keys_of_one_name() {
        assert_ne!(generate(None).unwrap().name(), generate(None).unwrap().name());
    }

    #[test]
    fn several_keys_sign_and_a_raw_one_is_among_them() {
        let folder = tempfile::tempdir().unwrap();
        let (nix, raw) = (folder.path().join("nix"), folder.path().join("raw"));
        write_new(&nix, &SecretKey::from_seed("cache-1", [1; 32]).unwrap()).unwrap();
        let key = ed25519_dalek::SigningKey::from_bytes(&[2; 32]);
        std::fs::write(&raw, key.to_keypair_bytes()).unwrap();
        let signer = Signer::read(&options(&[&nix, &raw])).unwrap();
        let signatures = signer.sign("1;text");
        assert_eq!(signatures.len(), 2);
        for (signature, key) in signatures.iter().zip(signer.public_keys()) {
            assert!(signature.verify(b"1;text", &[key]).unwrap());
        }
    }

    #[test]
    fn what_is_no_key_is_told_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        for text in ["", "no colon", "name:!!!", "name:AAAA", "a b:AAAA"] {
            std::fs::write(&path, text).unwrap();
            let error = Signer::read(&options(&[&path])).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        write_new(&path, &SecretKey::from_seed("same", [1; 32]).unwrap()).unwrap();
        let error = Signer::read(&options(&[&path, &path])).unwrap_err();
        assert!(matches!(error, SigningError::SameName { .. }), "{error}");
        let key = SecretKey::from_seed("same", [1; 32]).unwrap();
        let error = write_new(&path, &key).unwrap_err().to_string();
        assert!(error.contains("no key is overwritten"), "{error}");
        let error = write_new(&folder.path().join("nowhere/key"), &key).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "/nowhere/key can't be written: No such file or directory (os error 2); make its folder first"
            ),
            "{error}"
        );
    }
}
