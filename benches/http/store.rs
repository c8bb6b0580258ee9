//! What is served: a store that the real Nix makes, and its copy in files.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use crate::client::Nar;
use crate::memory::write_back;

/// Misses that wrk walks through: more than the hits, so that neither side meets the same one often.
const MISSES: usize = 20_000;

/// A path of 20,000 files.
pub(crate) struct Files {
    pub(crate) hash: String,
    /// How long each is.
    pub(crate) each: &'static str,
}

pub(crate) struct Store {
    pub(crate) folder: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) secret_key: PathBuf,
    public_key: String,
    /// Hash parts: of all paths, of one file of 671 MB, of 300 middling paths, of paths of 20,000 files.
    pub(crate) all: Vec<String>,
    pub(crate) large: String,
    pub(crate) middling: Vec<String>,
    pub(crate) files: [Files; 2],
    /// Where each path lies.
    paths: HashMap<String, PathBuf>,
    middling_root: String,
    /// Files with what wrk asks for.
    pub(crate) hits: PathBuf,
    pub(crate) misses: PathBuf,
}

impl Store {
    pub(crate) fn make(folder: &Path) -> Self {
        let began = Instant::now();
        let (root, secret_key) = (folder.join("store"), folder.join("secret-key"));
        let public_key = folder.join("public-key");
        let mut key = nix("nix-store", folder);
        run(key.args(["--generate-binary-cache-key", "bench-1"]).args([&secret_key, &public_key]));
        let expression = |name: &str, text: &str| {
            let file = folder.join(name);
            fs::write(&file, text).expect("an expression");
            file
        };
        let mut instantiate = nix("nix-instantiate", folder);
        instantiate.args(["--eval", "--read-write-mode", "--store"]).arg(&root);
        instantiate.arg(expression("small.nix", include_str!("small.nix")));
        let small = lines(&run(&mut instantiate)).concat().replace('"', "");
        let mut build = nix("nix-build", folder);
        build.args(["--no-out-link", "-j2", "--option", "substitute", "false", "--store"]).arg(&root);
        build.args(["--option", "sandbox-paths", "/bin/sh /bin/mkdir /lib /lib64 /usr/lib"]);
        let built = lines(&run(build.arg(expression("large.nix", include_str!("large.nix")))));
        let [large, middling_root, files, short] = &built[..] else { panic!("four paths, not {built:?}") };

        let cache = format!(
            "file://{}?compression=none&secret-key={}",
            folder.join("cache").display(),
            secret_key.display()
        );
        let mut copy = nix("nix", folder);
        copy.args(["--extra-experimental-features", "nix-command", "copy", "--to", &cache, "--from"]);
        run(copy.arg(&root).args(&built).arg(&small));
        let mut requisites = nix("nix-store", folder);
        requisites.arg("--store").arg(&root).args(["--query", "--requisites", middling_root]);
        let middling = lines(&run(&mut requisites)).iter().map(|path| hash_part(path)).collect();

        let names = fs::read_dir(folder.join("cache")).expect("the copy").flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let mut all: Vec<String> =
            names.filter_map(|name| name.strip_suffix(".narinfo").map(str::to_owned)).collect();
        all.sort();
        let entries = fs::read_dir(root.join("nix/store")).expect("the store").flatten();
        let entries = entries.filter(|entry| !entry.file_name().to_string_lossy().ends_with(".lock"));
        let paths = entries.map(|entry| (hash_part(&entry.file_name().to_string_lossy()), entry.path()));
        let paths = paths.collect();
        let store = Self {
            folder: folder.to_owned(),
            root,
            secret_key,
            public_key: fs::read_to_string(public_key).expect("a public key").trim().to_owned(),
            large: hash_part(large),
            files: [(files, "3.5 kB"), (short, "2 kB")]
                .map(|(path, each)| Files { hash: hash_part(path), each }),
            paths,
            middling_root: middling_root.clone(),
            middling,
            all,
            hits: folder.join("hits"),
            misses: folder.join("misses"),
        };
        store.write_walks();
        write_back(folder);
        let took = began.elapsed().as_secs_f64();
        println!("{} paths made and copied into files in {took:.0} s", store.all.len());
        store
    }

    /// Where a path lies.
    pub(crate) fn path_of(&self, hash: &str) -> &Path {
        &self.paths[hash]
    }

    /// The file that nginx has of a NAR.
    pub(crate) fn file_of(&self, nar: &Nar) -> PathBuf {
        self.folder.join("cache").join(nar.url.trim_start_matches('/'))
    }

    fn write_walks(&self) {
        let narinfos = |hashes: &mut dyn Iterator<Item = String>| {
            hashes.map(|hash| format!("/{hash}.narinfo\n")).collect::<String>()
        };
        fs::write(&self.hits, narinfos(&mut self.all.iter().cloned())).expect("a list");
        // Real hash parts turned around, in several ways: as random as those.
        let ways = MISSES.div_ceil(self.all.len());
        let turned = |way: usize| {
            self.all.iter().map(move |hash| {
                let (end, begin) = hash.split_at(way + 1);
                format!("{begin}{end}").chars().rev().collect()
            })
        };
        fs::write(&self.misses, narinfos(&mut (0..ways).flat_map(turned))).expect("a list");
    }

    /// Copies the middling paths into a store that is empty, and says how many seconds that took.
    pub(crate) fn copy_from(&self, server: SocketAddr) -> f64 {
        let target = self.folder.join("target");
        let mut copy = nix("nix", &self.folder);
        copy.args(["--extra-experimental-features", "nix-command", "copy", "--from"]);
        copy.arg(format!("http://{server}")).arg("--to").arg(&target).arg(&self.middling_root);
        copy.args(["--option", "require-sigs", "true", "--option", "trusted-public-keys", &self.public_key]);
        let began = Instant::now();
        run(&mut copy);
        let took = began.elapsed().as_secs_f64();
        // Store paths are read-only, which only keeps out who is not root.
        run(Command::new("chmod").args(["-R", "u+w"]).arg(&target));
        fs::remove_dir_all(&target).expect("a folder to empty");
        let _ = fs::remove_dir_all(self.folder.join(".cache"));
        took
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The temporary folder can't be removed by who is not root otherwise.
        let _ = Command::new("chmod").args(["-R", "u+w"]).arg(&self.root).status();
    }
}

fn hash_part(path: &str) -> String {
    path.trim_start_matches("/nix/store/").split('-').next().unwrap_or_default().to_owned()
}

/// Nix with a home and settings of its own. What it makes is thrown away, so it need not reach the disk.
fn nix(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("HOME", folder).env("NIX_CONF_DIR", folder);
    command.env("NIX_CONFIG", "build-users-group =\nfsync-metadata = false");
    command.env_remove("NIX_REMOTE").env_remove("NIX_PATH");
    command
}

fn run(command: &mut Command) -> Output {
    let output = command.output().expect("a program that was there before");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn lines(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
}
