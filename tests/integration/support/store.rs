//! Stores in temporary folders, filled by the real Nix.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use super::{succeed, text};

/// A store below a temporary folder, as `nix-store --store DIR` has it.
pub struct Store {
    folder: tempfile::TempDir,
}

/// What Nix is told of a path that lies in the store directory already.
pub struct Registration<'a> {
    pub path: &'a str,
    pub deriver: &'a str,
    pub references: &'a [&'a str],
}

impl Store {
    pub fn new() -> Self {
        let store = Self { folder: tempfile::Builder::new().prefix("peernix-test-").tempdir().unwrap() };
        // Nix makes the store when it is first asked.
        succeed(store.nix("nix-store").args(["--gc", "--print-roots"]));
        std::fs::create_dir_all(store.directory()).unwrap();
        store
    }

    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// Where its paths really lie.
    pub fn directory(&self) -> PathBuf {
        self.root().join("nix/store")
    }

    /// Where a path really lies.
    pub fn real(&self, path: &str) -> PathBuf {
        self.root().join(path.strip_prefix('/').unwrap())
    }

    /// A Nix program on this store, blind to the machine's configuration.
    pub fn nix(&self, program: &str) -> Command {
        let mut command = isolated(program, self.root());
        command.arg("--store").arg(self.root());
        command
    }

    /// Adds a file or tree under the name that it has.
    pub fn add(&self, path: &Path) -> String {
        text(self.nix("nix-store").arg("--add").arg(path))
    }

    /// A text in the store, from the Nix language.
    pub fn add_text(&self, name: &str, contents: &str) -> String {
        let file = self.root().join(name);
        std::fs::write(&file, contents).unwrap();
        self.add(&file)
    }

    /// Builds a Nix expression, in a sandbox that has a shell and no more.
    pub fn build(&self, expression: &str) -> Vec<String> {
        let file = self.root().join("test.nix");
        std::fs::write(&file, expression).unwrap();
        let mut build = self.nix("nix-build");
        build.args(["--no-out-link", "--option", "substitute", "false"]);
        build.args(["--option", "sandbox-paths", "/bin/sh /lib /lib64 /usr/lib"]).arg(file);
        text(&mut build).lines().map(str::to_owned).collect()
    }

    /// Tells Nix of paths that lie in the store directory: hash and size from `nix-store --dump`, the rest as given.
    pub fn register(&self, registrations: &[Registration<'_>]) {
        let mut database = String::new();
        for Registration { path, deriver, references } in registrations {
            let (hash, size) = dumped(&self.real(path));
            write!(database, "{path}\n{hash}\n{size}\n{deriver}\n{}\n", references.len()).unwrap();
            for reference in *references {
                writeln!(database, "{reference}").unwrap();
            }
        }
        self.load(&database);
    }

    /// The same for many small files, whose NARs are written here.
    pub fn register_files(&self, files: &[(String, Vec<u8>, Vec<String>)]) {
        let mut database = String::new();
        for (path, contents, references) in files {
            std::fs::write(self.real(path), contents).unwrap();
            let nar = file_nar(contents);
            let hash = hexadecimal(&Sha256::digest(&nar));
            write!(database, "{path}\n{hash}\n{}\n\n{}\n", nar.len(), references.len()).unwrap();
            for reference in references {
                writeln!(database, "{reference}").unwrap();
            }
        }
        self.load(&database);
    }

    fn load(&self, database: &str) {
        let mut load = self.nix("nix-store");
        let mut load = load.arg("--load-db").stdin(Stdio::piped()).spawn().unwrap();
        load.stdin.take().unwrap().write_all(database.as_bytes()).unwrap();
        assert!(load.wait().unwrap().success());
    }
}

/// SHA-256 and length of what `nix-store --dump` writes of a tree.
pub fn dumped(real: &Path) -> (String, u64) {
    let mut dump = Command::new("nix-store").arg("--dump").arg(real).stdout(Stdio::piped()).spawn().unwrap();
    let digest = Digested::read(dump.stdout.take().unwrap());
    assert!(dump.wait().unwrap().success());
    (digest.hash, digest.len)
}

/// SHA-256 and length of a stream, whatever its length.
pub struct Digested {
    pub hash: String,
    pub len: u64,
}

impl Digested {
    pub fn read(mut stream: impl Read) -> Self {
        let (mut hasher, mut len, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => break,
                read => {
                    hasher.update(&buffer[..read]);
                    len += read as u64;
                }
            }
        }
        Self { hash: hexadecimal(&hasher.finalize()), len }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The NAR of a plain file.
fn file_nar(contents: &[u8]) -> Vec<u8> {
    let mut nar = Vec::new();
    for part in [&b"nix-archive-1"[..], b"(", b"type", b"regular", b"contents", contents, b")"] {
        nar.extend_from_slice(&(part.len() as u64).to_le_bytes());
        nar.extend_from_slice(part);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

/// A Nix program that sees no configuration and no cache of this machine.
pub fn isolated(program: &str, home: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("HOME", home).env("XDG_CACHE_HOME", home.join("cache")).env("NIX_CONF_DIR", home);
    command.env("NIX_CONFIG", "build-users-group =\nexperimental-features = nix-command\nsubstitute = false");
    command.env_remove("NIX_REMOTE").env_remove("NIX_PATH");
    command
}
