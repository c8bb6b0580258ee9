//! Stores that the real Nix believes in, without much on the disk: long files are holes.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use peernix::nix::StorePathHash;
use sha2::{Digest as _, Sha256};

/// A store below a folder.
pub(crate) struct Store {
    pub(crate) root: PathBuf,
    folder: PathBuf,
}

/// A path that is registered.
pub(crate) struct StorePath {
    pub(crate) hash_part: String,
    name: String,
}

/// What a NAR has, and what Nix is told of it.
struct Facts {
    hash: String,
    size: usize,
}

impl Store {
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let store = Self { root: folder.join(name), folder: folder.to_owned() };
        fs::create_dir_all(store.directory()).expect("a store");
        store
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.root.join("nix/store")
    }

    /// Small files, all the same.
    pub(crate) fn add_small(&self, count: usize) -> Vec<StorePath> {
        let paths: Vec<StorePath> =
            (0..count).map(|number| StorePath::random(&format!("small-{number}"))).collect();
        for path in &paths {
            fs::write(self.directory().join(&path.name), "small\n").expect("a file");
        }
        let facts = self.facts(&paths[0]);
        self.register(&paths, &facts);
        paths
    }

    /// One file of this size.
    pub(crate) fn add_file(&self, name: &str, size: u64) -> StorePath {
        let path = StorePath::random(name);
        hole(&self.directory().join(&path.name), size);
        self.register(std::slice::from_ref(&path), &self.facts(&path));
        path
    }

    /// A folder with so many files of this size.
    pub(crate) fn add_files(&self, name: &str, count: usize, size: u64) -> StorePath {
        let path = StorePath::random(name);
        let folder = self.directory().join(&path.name);
        fs::create_dir(&folder).expect("a folder");
        (0..count).for_each(|number| hole(&folder.join(number.to_string()), size));
        self.register(std::slice::from_ref(&path), &self.facts(&path));
        path
    }

    /// As Nix itself writes the NAR: the relay checks it.
    fn facts(&self, path: &StorePath) -> Facts {
        let mut dump = self.nix_store();
        dump.arg("--dump").arg(self.directory().join(&path.name));
        let mut dump = dump.stdout(Stdio::piped()).spawn().expect("nix-store");
        let mut nar = dump.stdout.take().expect("a pipe");
        let (mut hash, mut size, mut buffer) = (Sha256::new(), 0, vec![0; 256 * 1024]);
        loop {
            match nar.read(&mut buffer).expect("a NAR") {
                0 => break,
                read => {
                    hash.update(&buffer[..read]);
                    size += read;
                }
            }
        }
        assert!(dump.wait().expect("nix-store").success());
        Facts { hash: hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(), size }
    }

    fn register(&self, paths: &[StorePath], facts: &Facts) {
        let registration: String = paths
            .iter()
            // No deriver, no references.
            .map(|path| format!("/nix/store/{}\n{}\n{}\n\n0\n", path.name, facts.hash, facts.size))
            .collect();
        let mut load = self.nix_store().arg("--load-db").stdin(Stdio::piped()).spawn().expect("nix-store");
        let mut stdin = load.stdin.take().expect("a pipe");
        stdin.write_all(registration.as_bytes()).expect("nix-store");
        drop(stdin);
        assert!(load.wait().expect("nix-store").success(), "nix-store --load-db");
    }

    /// On this store, with a home and settings of its own. What it writes is thrown away, so it need not reach the disk.
    pub(crate) fn nix_store(&self) -> Command {
        let mut command = Command::new("nix-store");
        command.env("HOME", &self.folder).env("NIX_CONF_DIR", &self.folder);
        command.env("NIX_CONFIG", "build-users-group =\nfsync-metadata = false");
        command.env_remove("NIX_REMOTE").env_remove("NIX_PATH").arg("--store").arg(&self.root);
        command
    }
}

impl StorePath {
    fn random(name: &str) -> Self {
        let hash = StorePathHash::from_bytes(std::array::from_fn(|_| fastrand::u8(..)));
        Self { hash_part: hash.to_string(), name: format!("{hash}-{name}") }
    }

    pub(crate) fn url(&self) -> String {
        format!("/nix-cache/{}.narinfo", self.hash_part)
    }
}

/// A file that takes no room.
fn hole(path: &Path, size: u64) {
    File::create(path).and_then(|file| file.set_len(size)).expect("a file with a hole");
}
