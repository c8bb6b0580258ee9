//! `peernix try`: shows on this machine, in a minute and without a trace, that a real Nix gets real paths from it.
//!
//! Two stores in a temporary folder, a daemon for each on loopback, which find each other. Nix builds a closure in the
//! first; then it is asked to realise it in the second through the second's own daemon, with signatures required: with a
//! wrong key it has to refuse, with the right one to copy what that daemon relays.

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use rustix::io::Errno;
use rustix::process::WaitOptions;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::daemon::Daemon;
use crate::signing;

/// Derivations that need nothing but a shell: a chain in which each refers to the one before, and the first holds
/// 64 MiB. Input-addressed, so that Nix wants a signature for each.
const EXPRESSION: &str = r#"
let
  build = name: script: before: derivation {
    inherit name before;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-c" script ];
  };
  data = build "peernix-try-data" ''
    block=peernix-try.
    for i in 1 2 3 4 5 6 7 8 9 10 11 12; do block=$block$block; done
    i=0
    while [ $i -lt 1400 ]; do printf %s "$block"; i=$((i+1)); done > $out
  '' null;
  link = before: n:
    build "peernix-try-${toString n}" ''echo "$before and $out" > $out'' before;
in builtins.foldl' link data (builtins.genList (n: n + 1) 24)
"#;

/// How long the daemons may take to find each other.
const FIND_TIME: Duration = Duration::from_secs(10);

/// How long everything that still runs may take to be gone, and to leave the folder alone.
const LEAVE_TIME: Duration = Duration::from_secs(5);

/// The most lines of a reason that are shown after its first.
const MAX_REASON: usize = 6;

/// What a failure to build has in it where Nix may not make a sandbox.
const NO_SANDBOX: [&str; 4] = ["namespace", "cloning builder process", "unsharing", "mounting"];

pub(super) fn try_out() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("the runtime can't be started")?;
    // From here on signals are ours: one that comes before the folder is there must not be lost either.
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    // A builder whose Nix was killed comes to us, so that its end can be waited for; where that can't be, it is on its own.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let folder = tempfile::Builder::new().prefix("peernix-try-").tempdir();
    let folder = folder.context("no temporary folder can be made")?;
    let trial = Trial { folder: folder.path().to_owned() };
    // Dropped midway, the trial kills the programs that it waits for.
    let outcome = runtime.block_on(async {
        tokio::select! {
            biased;
            _ = interrupt.recv() => Err(anyhow!("interrupted")),
            _ = terminate.recv() => Err(anyhow!("terminated")),
            outcome = trial.run() => outcome,
        }
    });
    let until = Instant::now() + LEAVE_TIME;
    runtime.shutdown_timeout(LEAVE_TIME);
    wait_for_the_rest(until);
    let removed = remove(folder.path(), until);
    let removed = removed.with_context(|| format!("{} can't be removed", folder.path().display()));
    let report = match (outcome, removed) {
        (Ok(report), removed) => removed.map(|()| report)?,
        (Err(error), Ok(())) => return Err(error),
        (Err(error), Err(left)) => bail!("{error:#}; and {left:#}"),
    };
    write!(std::io::stdout(), "{report}").context("the report can't be printed")
}

struct Trial {
    folder: PathBuf,
}

impl Trial {
    async fn run(&self) -> anyhow::Result<String> {
        for store in ["first", "second"] {
            std::fs::create_dir(self.folder.join(store)).context("a store can't be made")?;
        }
        self.check_nix().await?;
        say("building a closure in the first store");
        let path = self.build().await?;
        let closure = lines(self.nix("nix-store", "first").args(["--query", "--requisites", &path])).await?;
        let mut sizes = self.nix("nix-store", "first");
        let sizes = lines(sizes.args(["--query", "--size"]).args(&closure)).await?;
        let bytes: u64 = sizes.iter().filter_map(|size| size.parse::<u64>().ok()).sum();

        say("starting a daemon for each store");
        let first = Daemon::start(&self.config("first")).await?;
        let mut config = self.config("second");
        let target = first.udp_port().map(|port| ([127, 0, 0, 1], port).into());
        config.discovery.targets = vec![target.context("a daemon without a UDP port")?];
        config.trust.public_keys = vec![first.public_key_line()];
        let second = Daemon::start(&config).await?;
        say("waiting until they have found each other");
        let found = found_each_other(&first, &second).await?;
        let url = |daemon: &Daemon| -> anyhow::Result<String> {
            let address = daemon.addresses().first().context("a daemon that listens nowhere")?;
            Ok(format!("http://{address}/nix-cache"))
        };

        say("asking the second daemon, with a key that did not sign: Nix has to refuse");
        let stranger = signing::generate(None)?.public_key();
        let stranger = crate::nix::signature::public_key_text(&stranger);
        let refused = self.realise(&path, &url(&second)?, &stranger).output().await?;
        ensure!(!refused.status.success(), "Nix took paths that no trusted key has signed");

        say("asking the second daemon, with its own key: Nix has to copy what it relays from the first");
        let began = Instant::now();
        succeed(&mut self.realise(&path, &url(&second)?, &second.public_key_line())).await?;
        let took = began.elapsed();
        let copied = lines(self.nix("nix-store", "second").args(["--query", "--requisites", &path])).await?;
        ensure!(copied == closure, "the copy has {} paths of {}", copied.len(), closure.len());
        succeed(self.nix("nix-store", "second").arg("--verify-path").args(&copied)).await?;
        tokio::join!(first.shutdown(), second.shutdown());
        Ok(report(closure.len(), bytes, found, took))
    }

    /// That Nix is here. On a store of our own: this user may have no right to the machine's.
    async fn check_nix(&self) -> anyhow::Result<()> {
        for program in ["nix-store", "nix-build"] {
            match self.nix(program, "first").arg("--version").output().await {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    bail!("{program} was not found: install Nix first (on Debian: apt-get install nix-bin)");
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn build(&self) -> anyhow::Result<String> {
        let file = self.folder.join("try.nix");
        std::fs::write(&file, EXPRESSION).context("the expression can't be written")?;
        let mut build = self.nix("nix-build", "first");
        // The sandbox of a store elsewhere has nothing of this machine but what it is given.
        let shell = ["/bin/sh", "/lib", "/lib64", "/usr/lib"];
        let there: Vec<&str> = shell.into_iter().filter(|path| Path::new(path).exists()).collect();
        build.args(["--no-out-link", "--option", "substitute", "false"]);
        build.args(["--option", "sandbox-paths", &there.join(" ")]).arg(&file);
        let output = output(&mut build).await?;
        if !output.status.success() {
            let why = why(&output);
            let is_forbidden = NO_SANDBOX.iter().any(|part| why.contains(part));
            let hint = "; building in a store of its own takes user namespaces, which some containers forbid";
            bail!("Nix can't build here: {why}{}", if is_forbidden { hint } else { "" });
        }
        let built = text_lines(output)?;
        built.last().cloned().context("nix-build printed no path")
    }

    fn realise(&self, path: &str, url: &str, key: &str) -> Command {
        let mut realise = self.nix("nix-store", "second");
        realise.args(["--realise", path, "--max-jobs", "0"]);
        realise.args(["--option", "substituters", url, "--option", "trusted-public-keys", key]);
        realise.args(["--option", "require-sigs", "true", "--option", "connect-timeout", "5"]);
        realise
    }

    /// A Nix program on one of the two stores. It sees no configuration and no cache of this machine.
    fn nix(&self, program: &str, store: &str) -> Command {
        let mut command = Command::new(program);
        command.kill_on_drop(true).stdin(std::process::Stdio::null());
        command.arg("--store").arg(self.folder.join(store));
        command.env("HOME", &self.folder).env("XDG_CACHE_HOME", self.folder.join("cache"));
        command.env("NIX_CONF_DIR", &self.folder).env("NIX_CONFIG", "build-users-group =");
        command.env("TMPDIR", &self.folder).env_remove("NIX_PATH").env_remove("NIX_REMOTE");
        command
    }

    fn config(&self, store: &str) -> Config {
        let mut config = Config::default();
        config.http.listen = vec![([127, 0, 0, 1], 0).into()];
        config.http.drain_time = Duration::from_secs(1);
        config.discovery.port = 0;
        // On loopback there is nobody but the two.
        config.discovery.mdns = false;
        config.trust.host_keys = false;
        config.store.root = Some(self.folder.join(store));
        config.state.directory = Some(self.folder.join(format!("{store}-state")));
        config
    }
}

/// Waits until each daemon knows the other, and says how long that took.
async fn found_each_other(first: &Daemon, second: &Daemon) -> anyhow::Result<Duration> {
    let began = Instant::now();
    while first.peers().all().is_empty() || second.peers().all().is_empty() {
        ensure!(began.elapsed() < FIND_TIME, "the daemons did not find each other within {FIND_TIME:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(began.elapsed())
}

fn report(paths: usize, bytes: u64, found: Duration, took: Duration) -> String {
    let megabytes = bytes as f64 / 1e6;
    format!(
        "\n  found each other      after {:.0} ms\n  paths copied         {paths}\n  bytes                {bytes} ({megabytes:.1} MB)\n  \
         speed                {:.0} MB/s, {:.2} s in all\n  \
         signatures           required; refused with a wrong key, accepted with the right one\n  \
         contents             verified by nix-store --verify-path\n\nIt works here. The temporary stores are gone.\n",
        found.as_secs_f64() * 1e3,
        megabytes / took.as_secs_f64(),
        took.as_secs_f64(),
    )
}

fn say(step: &str) {
    let _ = writeln!(std::io::stderr(), "{step} …");
}

async fn output(command: &mut Command) -> anyhow::Result<Output> {
    let shown = command.as_std().get_program().to_string_lossy().into_owned();
    command.output().await.with_context(|| format!("{shown} can't be started"))
}

async fn succeed(command: &mut Command) -> anyhow::Result<Output> {
    let output = output(command).await?;
    if !output.status.success() {
        bail!("{} failed: {}", command.as_std().get_program().to_string_lossy(), why(&output));
    }
    Ok(output)
}

/// What Nix gives as the reason, in one line. What comes after its first error only says what else could not be done for it.
fn why(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let Some(first) = lines.by_ref().find(|line| line.starts_with("error:")) else {
        return said.trim().lines().last().unwrap_or("it does not say why").to_owned();
    };
    let rest = lines.take_while(|line| !line.starts_with("error:")).take(MAX_REASON);
    std::iter::once(first).chain(rest).collect::<Vec<_>>().join(" ")
}

async fn lines(command: &mut Command) -> anyhow::Result<Vec<String>> {
    text_lines(succeed(command).await?)
}

fn text_lines(output: Output) -> anyhow::Result<Vec<String>> {
    let text = String::from_utf8(output.stdout).context("Nix printed what is not UTF-8")?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Waits until all is gone that Nix had started, which ends by itself soon after a Nix that was killed: it could make the
/// folder anew.
fn wait_for_the_rest(until: Instant) {
    while Instant::now() < until {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => break,
        }
    }
}

/// Removes the folder, once at least. What is not gone yet may still put something there.
fn remove(folder: &Path, until: Instant) -> std::io::Result<()> {
    loop {
        match make_writable(folder).and_then(|()| std::fs::remove_dir_all(folder)) {
            Err(error) if error.kind() != ErrorKind::PermissionDenied && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
}

/// Store paths are read-only: nobody but root could remove what lies in them.
fn make_writable(folder: &Path) -> std::io::Result<()> {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700))?;
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(())
}
