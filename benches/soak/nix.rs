//! Stores, and the real Nix on them.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

/// A closure whose paths differ between generations and are the same wherever they are built. Input-addressed, so that Nix wants
/// signatures. No block of a file is like another, so that bytes of the wrong place would be seen. Every second path is a
/// tree, and one is so large that peers die in the middle of it.
const PATHS: &str = r#"
{ name, count, large }:
let
  blocks = [ 1 2 0 63 4 80 16 large 1 70 3 24 ];
  build = n: below: derivation {
    inherit below;
    name = "soak-${name}-${toString n}";
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" ''
      block=${name}-soak-of-16b
      for i in 1 2 3 4 5 6 7 8 9 10 11 12; do block=$block$block; done
      fill() { i=0; while [ $i -lt ${toString (builtins.elemAt blocks n)} ]; do printf '%s %s' $i "$block"; i=$((i+1)); done; }
      if [ ${toString n} -eq $((${toString n} / 2 * 2)) ]; then
        /bin/mkdir -p $out/bin $out/empty
        echo "$below" > $out/bin/run
        /bin/chmod +x $out/bin/run
        /bin/ln -s ../bin/run $out/empty/link
        fill > $out/data
      else
        (echo "$below"; fill) > $out
      fi
    '' ];
  };
  node = n: build n (map node (builtins.filter (m: m < count) [ (2 * n + 1) (2 * n + 2) ]));
in node 0
"#;

/// A store below a folder.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pub(crate) folder: PathBuf,
    pub(crate) name: String,
}

/// A path, and what Nix says of it where it was built.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) hash_part: String,
    pub(crate) nar_hash: String,
    pub(crate) nar_size: u64,
}

/// What a collector deleted, and when.
#[derive(Clone, Debug)]
pub(crate) struct Deletion {
    pub(crate) hash_part: String,
    /// When the collector began to look for what nothing keeps.
    pub(crate) collection: Instant,
    pub(crate) at: Instant,
}

impl Store {
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let store = Self { folder: folder.to_owned(), name: name.to_owned() };
        std::fs::create_dir_all(store.root()).expect("a store");
        let expression = folder.join("paths.nix");
        std::fs::write(expression, PATHS).expect("an expression");
        // Nix makes the store when it is first asked.
        let made = run(store.nix_store().args(["--gc", "--print-roots"]));
        assert!(made.is_ok(), "nix-store; install nix-bin: {made:?}");
        store
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    /// Builds a closure of `count` paths. `link`: keeps it from collection until another takes the place of the link.
    pub(crate) fn build(
        &self,
        name: &str,
        count: u64,
        large: u64,
        link: Option<&str>,
    ) -> Result<String, String> {
        let mut build = nix("nix-build", &self.folder);
        build.arg("--store").arg(self.root()).args(["--option", "substitute", "false"]);
        let visible = "/bin/sh /bin/mkdir /bin/chmod /bin/ln /lib /lib64 /usr/lib";
        build.args(["--option", "sandbox-paths", visible, "--argstr", "name", name]);
        build.args(["--arg", "count", &count.to_string(), "--arg", "large", &large.to_string()]);
        match link {
            Some(link) => build.arg("--out-link").arg(self.link(link)),
            None => build.arg("--no-out-link"),
        };
        let output = run(build.arg(self.folder.join("paths.nix")))?;
        Ok(text(&output.stdout).trim().to_owned())
    }

    /// Takes a closure from another store, and keeps it.
    pub(crate) fn take(&self, path: &str, from: &Self, link: &str) -> Result<(), String> {
        let mut copy = nix("nix", &self.folder);
        copy.args(["copy", "--no-check-sigs", "--from"]).arg(from.root()).arg("--to").arg(self.root());
        run(copy.arg(path))?;
        let mut keep = self.nix_store();
        keep.args(["--option", "substitute", "false", "--add-root"]).arg(self.link(link));
        run(keep.args(["--realise", path])).map(drop)
    }

    /// Every path of a closure.
    pub(crate) fn members(&self, top: &str) -> Result<Vec<Member>, String> {
        let query = |arguments: &[&str]| {
            let output = run(self.nix_store().arg("--query").args(arguments))?;
            Ok::<_, String>(text(&output.stdout).lines().map(str::to_owned).collect::<Vec<_>>())
        };
        let paths = query(&["--requisites", top])?;
        let arguments = |what| std::iter::once(what).chain(paths.iter().map(String::as_str));
        let hashes = query(&arguments("--hash").collect::<Vec<_>>())?;
        let sizes = query(&arguments("--size").collect::<Vec<_>>())?;
        assert!(hashes.len() == paths.len() && sizes.len() == paths.len(), "as many answers as questions");
        let members = paths.iter().zip(hashes).zip(sizes).map(|((path, nar_hash), size)| Member {
            hash_part: hash_part(path).expect("a store path"),
            nar_hash,
            nar_size: size.parse().expect("a size"),
        });
        Ok(members.collect())
    }

    /// Deletes what nothing keeps.
    pub(crate) fn collect(&self) -> Result<Vec<Deletion>, String> {
        let collection = Instant::now();
        let mut collector = self.nix_store();
        collector.arg("--gc").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut collector = collector.spawn().map_err(|error| error.to_string())?;
        let (mut deletions, mut told) = (Vec::new(), String::new());
        let lines = BufReader::new(collector.stderr.take().expect("what it says")).lines();
        for line in lines.map_while(Result::ok) {
            let path = line.strip_prefix("deleting '").and_then(hash_part);
            let deletion = path.map(|hash_part| Deletion { hash_part, collection, at: Instant::now() });
            deletions.extend(deletion);
            told = line;
        }
        let is_good = collector.wait().map_err(|error| error.to_string())?.success();
        if is_good { Ok(deletions) } else { Err(told) }
    }

    /// Reads every file again.
    pub(crate) fn verify(&self) -> Result<(), String> {
        let output = run(self.nix_store().args(["--verify", "--check-contents"]))?;
        let told = text(&output.stderr);
        if told.contains("was modified") || told.contains("error") { Err(told) } else { Ok(()) }
    }

    fn nix_store(&self) -> Command {
        let mut command = nix("nix-store", &self.folder);
        command.arg("--store").arg(self.root());
        command
    }

    fn link(&self, link: &str) -> PathBuf {
        self.folder.join(format!("{}-{link}", self.name))
    }
}

fn hash_part(path: &str) -> Option<String> {
    path.strip_prefix("/nix/store/")?.get(..32).map(str::to_owned)
}

/// A Nix program that sees no configuration and no cache of this machine.
pub(crate) fn nix(program: &str, home: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("HOME", home).env("NIX_CONF_DIR", home).env("XDG_CACHE_HOME", home.join(".cache"));
    command.env("NIX_CONFIG", "build-users-group =\nexperimental-features = nix-command");
    command.env_remove("NIX_REMOTE").env_remove("NIX_PATH");
    command
}

/// What it printed, or what it said of its failure.
pub(crate) fn run(command: &mut Command) -> Result<Output, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() { Ok(output) } else { Err(text(&output.stderr)) }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
