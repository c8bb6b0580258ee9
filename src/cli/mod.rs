//! The command line: what can be asked of `peernix`, and how failures are told (one line on stderr, exit code 1).

mod logging;
mod peers;
mod serve;
mod try_out;

use std::ffi::OsString;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::{self, Config};
use crate::nix::signature::public_key_text;
use crate::signing::{self, Signer};

/// What follows from a store that can't be asked. It may be installed later, so the configuration is good all the same.
const NOTHING_SERVED: &str = "peernix starts all the same, and serves nothing of this host until then";

/// A binary cache for Nix made of the machines on your LAN.
///
/// Without a command it serves. The local Nix asks it with this line in nix.conf:
/// `extra-substituters = http://127.0.0.1:9999/nix-cache`
#[derive(Debug, Parser)]
#[command(name = "peernix", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    serve: ServeArguments,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Debug, clap::Args)]
struct Common {
    /// The configuration file [default: $PEERNIX_CONFIG, else /etc/peernix/peernix.toml, if it exists]
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, clap::Args)]
struct ServeArguments {
    /// An address to listen on, in the place of those that http.listen names; may be given several times
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = address)]
    listen: Vec<SocketAddr>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the local store (what `peernix` does without a command)
    Serve(ServeArguments),
    /// Show that it works here: two throwaway stores, and a real copy from one into the other
    Try,
    /// Show who is there: asks the running daemon
    Peers {
        /// Where the daemon listens [default: where http.listen says, on loopback]
        #[arg(long)]
        url: Option<String>,
    },
    /// Check the configuration, and the keys and the store that it names
    CheckConfig,
    /// Make keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Print the completions of a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a secret key; the public half, for trusted-public-keys in nix.conf, is printed
    Generate {
        /// The key's name; Nix trusts one key of a name, so let it be unique
        name: String,
        /// The file to write the secret key to; it must not exist yet. Without it the secret goes to stdout and the
        /// public key to stderr
        #[arg(long, value_name = "FILE")]
        to: Option<PathBuf>,
    },
}

/// Runs the program with the arguments of this process.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and go to stdout with 0.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has read enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "peernix: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.root_cause().downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// An error with its causes, each said once.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| cause.to_string().replace('\n', " ")) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(arguments)
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    match cli.command.unwrap_or(Command::Serve(ServeArguments::default())) {
        Command::Serve(arguments) => {
            let listen = [cli.serve.listen, arguments.listen].concat();
            let (config, file) = config(&cli.common, listen)?;
            check_named(&config, file.as_deref())?;
            serve::serve(config)
        }
        Command::Try => try_out::try_out(),
        Command::Peers { url: Some(url) } => peers::peers(&url),
        Command::Peers { url: None } => {
            let own = config(&cli.common, cli.serve.listen)?.0.http.loopback();
            let own = own.context("http.listen has no address on loopback: name the daemon with --url")?;
            peers::peers(&format!("http://{own}"))
        }
        Command::CheckConfig => check_config(&cli.common, cli.serve.listen),
        Command::Key(KeyCommand::Generate { name, to }) => generate_key(&name, to),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "peernix", &mut std::io::stdout());
            Ok(())
        }
        Command::Man => {
            std::io::stdout().write_all(&manual()?)?;
            Ok(())
        }
    }
}

/// The manual page. One for all commands: their names are told as they are typed, and not as pages of their own.
fn manual() -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut page)?;
    let text = String::from_utf8_lossy(&page);
    let typed = |line: &str| match line.strip_prefix("peernix\\-").and_then(|rest| rest.strip_suffix("(1)")) {
        Some(command) => format!("peernix {command}\n"),
        None => format!("{line}\n"),
    };
    Ok(text.lines().map(typed).collect::<String>().into_bytes())
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|error| format!("{error}; {}", config::LISTEN_FORM))
}

/// The configuration, with the addresses that the command line may have in the place of its own, and the file that it was read from.
fn config(common: &Common, listen: Vec<SocketAddr>) -> anyhow::Result<(Config, Option<PathBuf>)> {
    let variable = || std::env::var_os("PEERNIX_CONFIG").filter(|value| !value.is_empty()).map(PathBuf::from);
    let (mut config, file) = Config::load(common.config.clone().or_else(variable).as_deref())?;
    if !listen.is_empty() {
        config.http.listen = listen;
    }
    Ok((config, file))
}

/// Whether what the configuration names can be used: the keys, and the store if there is one. Asked before serving too, so
/// that what is wrong is told with its file, and `check-config` calls nothing good that `serve` refuses.
fn check_named(config: &Config, file: Option<&Path>) -> anyhow::Result<(Signer, bool)> {
    let named = || {
        let signer = Signer::read(&config.signing).context("signing.keys")?;
        Ok((signer, config.store.is_there()?))
    };
    named().map_err(|error: anyhow::Error| match file {
        Some(file) => error.context(file.display().to_string()),
        None => error,
    })
}

fn check_config(common: &Common, listen: Vec<SocketAddr>) -> anyhow::Result<()> {
    let (config, file) = config(common, listen)?;
    let (mut signer, store_is_there) = check_named(&config, file.as_deref())?;
    if config.signing.keys.is_empty()
        && let Ok(state) = config.state.directory()
    {
        signer = Signer::own(&state)?.unwrap_or(signer);
    }
    logging::filter(&config.log)?;
    let mut warnings = Vec::new();
    if !store_is_there {
        let directory = config.store.directory();
        warnings.push(format!("there is no store at {} yet: {NOTHING_SERVED}", directory.display()));
    }
    if let Err(error) = config.store.find_nix_store() {
        warnings.push(format!("{error}; {NOTHING_SERVED}"));
    }
    warnings.extend(config.http.shuts_out_own_nix());
    warnings.extend(config.tells_no_targets());
    for file in config.signing.open_to_all() {
        warnings.push(format!("every user of this machine may read {}: chmod 600 it", file.display()));
    }
    let mut out = std::io::stdout().lock();
    let but = if warnings.is_empty() { "" } else { ", but:" };
    match file {
        Some(file) => writeln!(out, "{} is good{but}", file.display())?,
        None => writeln!(out, "there is no {}: the defaults are good{but}", config::DEFAULT_FILE)?,
    }
    for warning in warnings {
        writeln!(out, "warning: {warning}")?;
    }
    if signer.public_keys().is_empty() {
        writeln!(out, "signs with a key of its own in the state folder, which is made there at first start")?;
    }
    for key in signer.public_keys() {
        writeln!(out, "signs as {}", public_key_text(&key))?;
    }
    Ok(())
}

fn generate_key(name: &str, to: Option<PathBuf>) -> anyhow::Result<()> {
    let key = signing::generate(Some(name))?;
    let public = public_key_text(&key.public_key());
    match to {
        Some(path) => {
            signing::write_new(&path, &key)?;
            writeln!(std::io::stdout(), "{public}").context("the public key can't be printed")
        }
        None => {
            writeln!(std::io::stderr(), "{public}")?;
            writeln!(std::io::stdout(), "{}", key.to_file_text()).context("the key can't be printed")
        }
    }
}
