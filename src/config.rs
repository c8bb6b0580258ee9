//! The configuration: one TOML file, every key optional, all of it checked before anything starts.
//!
//! Each part of the daemon documents its own options; this module puts them together and turns what is wrong into one
//! line that names the file, the line and the key.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;
use toml::de::{DeTable, DeValue};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::{cache, http, peer, resolve, signing, store, trust};

/// Where the configuration lies if nobody says otherwise and the file exists.
pub const DEFAULT_FILE: &str = "/etc/peernix/peernix.toml";
/// What an address to listen on looks like, for those that are none.
pub const LISTEN_FORM: &str =
    "an address reads \"192.168.1.10:9999\"; \"[::]:9999\" is all that this host has";
/// What another host's address looks like.
const ADDRESS_FORM: &str = "an address reads \"192.168.1.10:9999\" or \"[fd00::10]:9999\"";
/// The largest configuration that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// The whole configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[http]`
    pub http: http::Options,
    /// `[limits]`
    pub limits: http::Limits,
    /// `[store]`
    pub store: store::Options,
    /// `[signing]`
    pub signing: signing::Options,
    /// `[trust]`
    pub trust: trust::Options,
    /// `[discovery]`
    pub discovery: peer::Options,
    /// `[[peer]]`
    pub peer: Vec<peer::ConfiguredPeer>,
    /// `[resolve]`
    pub resolve: resolve::Options,
    /// `[share]`
    pub share: resolve::ShareOptions,
    /// `[cache]`
    pub cache: cache::Options,
    /// `[state]`
    pub state: State,
    /// `[log]`
    pub log: Log,
}

/// `[state]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct State {
    /// Where keys and what is to survive a restart are kept. Default: `$STATE_DIRECTORY` (systemd sets it), else
    /// `$XDG_STATE_HOME/peernix`, else `~/.local/state/peernix`.
    pub directory: Option<PathBuf>,
}

/// `[log]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `text` or `json`, to stderr. Default: text.
    pub format: LogFormat,
    /// What is logged, as tracing-subscriber's filter reads it: `info`, `peernix=debug`. The environment's
    /// `PEERNIX_LOG` goes before it. Default: info.
    pub filter: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::default(), filter: "info".to_owned() }
    }
}

/// Why there is no configuration to start with.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{path}: can't be read: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, a value of the wrong kind.
    #[error("{path}:{line}: {message}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A value out of its range.
    #[error("{path}:{}{message}", line.map(|line| format!("{line}: ")).unwrap_or_else(|| " ".to_owned()))]
    Range {
        /// Which.
        path: PathBuf,
        /// Counted from 1, if the file has the key: a default can be out of range together with what it has.
        line: Option<usize>,
        /// The key, and its range.
        message: String,
    },
    /// No place for the state.
    #[error("there is no place to keep keys in: set state.directory, $STATE_DIRECTORY or $HOME")]
    NoStateDirectory,
}

impl Config {
    /// Reads the named file, or [`DEFAULT_FILE`] if it exists, or nothing: every key has a default. Gives the file with it
    /// that was read.
    pub fn load(file: Option<&Path>) -> Result<(Self, Option<PathBuf>), ConfigError> {
        let (path, required) = file.map_or((Path::new(DEFAULT_FILE), false), |path| (path, true));
        match read(path) {
            Ok(text) => Ok((Self::parse(&text, path)?, Some(path.to_owned()))),
            Err(error) if !required && error.kind() == std::io::ErrorKind::NotFound => {
                Ok((Self::default(), None))
            }
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// Reads and checks a configuration; `path` is only for what is said of errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let line = line_at(text, at);
            let message =
                explain(error.message(), text.lines().nth(line - 1).unwrap_or_default(), key_at(text, at));
            ConfigError::Parse { path: path.to_owned(), line, message }
        })?;
        if let Some((line, message)) = list_for_section(text) {
            return Err(ConfigError::Parse { path: path.to_owned(), line, message });
        }
        let checks = [
            config.http.check(),
            config.limits.check(),
            config.store.check(),
            config.trust.check(),
            config.discovery.check(),
            config.resolve.check(),
            config.cache.check(),
            config.state.check(),
            config.log.check(),
            config.signing.check(),
            config.check_memory(),
        ];
        let peers = peer::ConfiguredPeer::check_all(&config.peer);
        match checks.into_iter().chain([peers]).find_map(Result::err) {
            Some(message) => {
                let line = line_of(text, &message);
                Err(ConfigError::Range { path: path.to_owned(), line, message })
            }
            None => Ok(config),
        }
    }
}

impl Config {
    /// What is verified first is kept in memory until it is.
    fn check_memory(&self) -> Result<(), String> {
        let (memory, first) = (self.limits.relay_memory, self.resolve.verify_first);
        if first > memory {
            return Err(format!(
                "limits.relay_memory: {memory} is less than resolve.verify_first, which is {first}: raise the one or \
                 lower the other"
            ));
        }
        Ok(())
    }

    /// Why `discovery.targets` are told nothing, as `key: why`. `None`: they are told, or there are none.
    #[must_use]
    pub fn tells_no_targets(&self) -> Option<String> {
        let why = match &self.discovery {
            discovery if discovery.targets.is_empty() => return None,
            discovery if !discovery.enable => "discovery.enable is false",
            _ if self.http.listen.iter().all(|address| address.ip().is_loopback()) => {
                "http.listen has no address that they could reach"
            }
            _ => return None,
        };
        Some(format!("discovery.targets: these hosts are told nothing, since {why}: name each as a [[peer]]"))
    }
}

/// The line of a place in the text, counted from 1.
fn line_at(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at.min(text.len())).unwrap_or_default();
    before.iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// A list where a section has to be, which serde takes as the values of its keys in their order; and its line.
fn list_for_section(text: &str) -> Option<(usize, String)> {
    let table = DeTable::parse(text).ok()?;
    let is_list = |value: &DeValue<'_>| matches!(value, DeValue::Array(_));
    let (key, _) =
        table.get_ref().iter().find(|(key, value)| *key.get_ref() != "peer" && is_list(value.get_ref()))?;
    let name = key.get_ref();
    Some((line_at(text, key.span().start), format!("{name}: a list, expected a section: `[{name}]`")))
}

/// The key whose value is at this place in the text, with its section.
fn key_at(text: &str, at: usize) -> Option<String> {
    let table = DeTable::parse(text).ok()?;
    let inside = |table: &DeTable<'_>| {
        let found = table.iter().find(|(_, value)| value.span().contains(&at));
        found.map(|(key, _)| key.get_ref().to_string())
    };
    table.get_ref().iter().find_map(|(section, value)| match value.get_ref() {
        DeValue::Table(table) => inside(table).map(|key| format!("{}.{key}", section.get_ref())),
        DeValue::Array(tables) => {
            let key = tables.iter().find_map(|table| inside(table.get_ref().as_table()?));
            key.map(|key| format!("{}.{key}", section.get_ref()))
        }
        _ => value.span().contains(&at).then(|| section.get_ref().to_string()),
    })
}

/// The line of the key that a message begins with: `section.key: `. Of several peers it is the one whose URL it tells.
fn line_of(text: &str, message: &str) -> Option<usize> {
    let (section, key) = message.split_once(": ")?.0.split_once('.')?;
    let table = DeTable::parse(text).ok()?;
    let section = table.get_ref().get(section)?.get_ref();
    let is_told = |table: &&DeTable<'_>| {
        let url = table.get(key).and_then(|value| value.get_ref().as_str());
        url.is_some_and(|url| message.contains(&format!(": {url:?}: ")))
    };
    let table = match section {
        DeValue::Table(table) => table,
        // The later of two that are the same is the one too many.
        DeValue::Array(tables) => {
            tables.iter().rev().filter_map(|one| one.get_ref().as_table()).find(is_told)?
        }
        _ => return None,
    };
    let (key, _) = table.get_key_value(key)?;
    Some(line_at(text, key.span().start))
}

/// The parser's message, with the key that it is about and what would be right.
fn explain(message: &str, line: &str, key: Option<String>) -> String {
    let message = in_plain_words(&message.replace('\n', " "), line.trim());
    let right = match &*message {
        text if text.contains("invalid socket address") && line.contains("listen") => LISTEN_FORM,
        text if text.contains("invalid socket address") => ADDRESS_FORM,
        text if text.contains("invalid IP address") => {
            "a network reads \"10.0.0.0/8\" or \"fd00::/8\", one host \"10.0.0.1/32\""
        }
        text if text.contains("duration") || text.contains("time unit") => {
            "a duration reads \"30s\" or \"10min\""
        }
        _ => "",
    };
    let right = if right.is_empty() { String::new() } else { format!("; {right}") };
    match key {
        Some(key) => format!("{key}: {message}{right}"),
        None => format!("{message}{right}"),
    }
}

/// Serde names the Rust type that it expected; this says what to write.
fn in_plain_words(message: &str, line: &str) -> String {
    let Some((found, expected)) = message.rsplit_once(", expected ") else { return message.to_owned() };
    if let Some(number) = found.strip_suffix("` as i128").and_then(|text| text.split_once('`')) {
        return format!("{} is too {}", number.1, if number.1.starts_with('-') { "small" } else { "large" });
    }
    let heading = line.trim_start_matches('[').trim_start();
    let of_peer = heading.strip_prefix("peer").is_some_and(|rest| !rest.starts_with(char::is_alphanumeric));
    let right = match expected {
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number from 0 on",
        // The last is what the size's own reader says of a negative number.
        "parsable string" | "an integer or string" | "integer overflow" => {
            "a size: \"16 KiB\", or bytes from 0 on"
        }
        "a sequence" | "struct ConfiguredPeer" if of_peer => "`[[peer]]`, once for each peer",
        "a sequence" if line.starts_with("[[") => return format!("`{line}` stands once: single brackets"),
        "a sequence" => "a list in square brackets",
        other if other.starts_with("struct ") => "a section",
        other => other,
    };
    format!("{found}, expected {right}")
}

impl State {
    fn check(&self) -> Result<(), String> {
        match &self.directory {
            Some(directory) if !directory.is_absolute() => {
                Err(format!("state.directory: {} is not an absolute path", directory.display()))
            }
            _ => Ok(()),
        }
    }

    /// The folder for state. It need not exist yet.
    pub fn directory(&self) -> Result<PathBuf, ConfigError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let systemd = || {
            // systemd separates several folders by colons; ours is the first.
            let value = variable("STATE_DIRECTORY")?.into_string().ok()?;
            value.split(':').next().map(PathBuf::from)
        };
        let xdg = || Some(PathBuf::from(variable("XDG_STATE_HOME")?).join("peernix"));
        let home = || Some(PathBuf::from(variable("HOME")?).join(".local/state/peernix"));
        let found = self.directory.clone().or_else(systemd).or_else(xdg).or_else(home);
        found.ok_or(ConfigError::NoStateDirectory)
    }
}

impl Log {
    /// A filter as `log.filter` and `$PEERNIX_LOG` have it, or why it is none.
    pub fn parse_filter(text: &str) -> Result<EnvFilter, String> {
        let is_ours = |word: &str| word == "peernix" || word.starts_with("peernix::");
        // A word alone that is no level would be taken for a part's name, and silence all others.
        let strange = text.split(',').map(str::trim).find(|word| {
            let is_word = !word.is_empty() && !word.contains(['=', '[', ']']);
            is_word && word.parse::<LevelFilter>().is_err() && !is_ours(word)
        });
        let filter = EnvFilter::try_new(text).ok().filter(|_| strange.is_none());
        filter.ok_or_else(|| {
            let wrong = strange.unwrap_or(text);
            format!("{wrong:?} is none of off, error, warn, info, debug, trace, nor like \"info,peernix::http=debug\"")
        })
    }

    fn check(&self) -> Result<(), String> {
        Self::parse_filter(&self.filter).map(drop).map_err(|why| format!("log.filter: {why}"))
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!("it has more than {MAX_FILE} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn complaint(text: &str) -> String {
        Config::parse(text, Path::new("peernix.toml")).unwrap_err().to_string()
    }

    #[test]
    fn what_is_wrong_is_told_in_one_line_with_file_line_and_key() {
        let unknown = complaint("[http]\npriority = 1\n\nprioritty = 2\n");
        assert!(unknown.starts_with("peernix.toml:4: unknown field `prioritty`"), "{unknown}");
        let unknown = complaint("[htttp]\n");
        assert!(unknown.starts_with("peernix.toml:1: unknown field `htttp`"), "{unknown}");
        let kind = complaint("[store]\nlease = 5\n");
        assert!(kind.starts_with("peernix.toml:2: "), "{kind}");
        let range = complaint("[store]\nlease = \"1ms\"\n");
        assert_eq!(range, "peernix.toml:2: store.lease: has to be 1s to 1day");
        let peers = "[[peer]]\nurl = \"http://a\"\n\n[[peer]]\nurl = \"http://a\" # again\n";
        assert!(complaint(peers).starts_with("peernix.toml:5: peer.url: \"http://a\": it is there twice"));
        assert_eq!(
            complaint("[resolve]\nverify_first = \"80 MiB\"\n"),
            "peernix.toml: limits.relay_memory: 64.0 MiB is less than resolve.verify_first, which is 80.0 MiB: raise \
             the one or lower the other"
        );
        for (line, key) in [
            ("[discovery]\ntargets = [\"x\"]", "\"[fd00::10]:9999\""),
            ("[http]\nlisten = [\"x\"]", "\"[::]:9999\""),
            ("[signing]\nkeys = [\"key\"]", "2: signing.keys: key is not an absolute path"),
        ] {
            assert!(complaint(line).contains(key), "{}", complaint(line));
        }
        let copies = complaint("[limits]\nnar_copies = \"8 MiB\"\n");
        assert!(
            copies.starts_with("peernix.toml:2: limits.nar_copies: has to be 0 or at least 16 MiB"),
            "{copies}"
        );
        for text in ["[http", "a = ", "[limits]\nheader_size = \"x\"", "[http]\nallow = [\"10.0.0.0/99\"]"] {
            assert!(!complaint(text).contains('\n'), "{text}");
        }
    }

    #[test]
    fn targets_that_are_told_nothing_are_warned_of() {
        let targets = "[discovery]\ntargets = [\"10.0.0.2:9999\"]\n";
        let local = "[http]\nlisten = [\"127.0.0.1:9999\"]\n";
        for (text, told) in [
            (targets.to_owned(), None),
            (local.to_owned(), None),
            (format!("{targets}enable = false\n"), Some("discovery.enable is false")),
            (format!("{targets}{local}"), Some("http.listen has no address")),
        ] {
            let why = Config::parse(&text, Path::new("peernix.toml")).unwrap().tells_no_targets();
            assert_eq!(why.is_some(), told.is_some(), "{text}");
            assert!(why.unwrap_or_default().contains(told.unwrap_or_default()), "{text}");
        }
    }

    #[test]
    fn the_shipped_file_shows_every_key_with_its_default() {
        let text = include_str!("../config/peernix.toml");
        Config::parse(text, Path::new("config/peernix.toml")).unwrap();
        // With the comments taken away it is the default configuration.
        let lines = text.lines().map(|line| {
            let key = line.strip_prefix("# ").filter(|rest| {
                rest.starts_with("[[")
                    || rest
                        .split_once(" = ")
                        .is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
            });
            format!("{}\n", key.unwrap_or(line))
        });
        let all: String = lines.collect();
        let table: toml::Table = toml::from_str(&all).unwrap();
        let mut config = Config::parse(&all, Path::new("all")).unwrap();
        assert_eq!(config.peer.len(), 1);
        config.peer.clear();
        let shown = format!("{config:?}");
        let keys: BTreeSet<String> =
            table.values().filter_map(|v| v.as_table()).flat_map(|t| t.keys().cloned()).collect();
        // The fields of all options, as the program itself shows them.
        let fields =
            shown.split(": ").filter_map(|part| part.rsplit([' ', '{', '(']).next()).map(str::to_owned);
        let sections = [
            "http",
            "limits",
            "store",
            "signing",
            "state",
            "log",
            "trust",
            "discovery",
            "peer",
            "resolve",
            "share",
            "cache",
        ];
        let sections = sections.map(str::to_owned);
        let fields: BTreeSet<String> = fields.filter(|field| !sections.contains(field)).collect();
        let is_key =
            |field: &&String| !field.is_empty() && field.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        assert_eq!(keys.iter().collect::<Vec<_>>(), fields.iter().filter(is_key).collect::<Vec<_>>());
        let mut without = config;
        without.store.root = None;
        without.limits.compressors = None;
        without.state.directory = None;
        without.signing.keys.clear();
        without.trust.public_keys.clear();
        without.discovery.targets.clear();
        without.http.relay_for.clear();
        assert_eq!(format!("{without:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_told_with_what_would_be_right() {
        for (text, expected) in [
            ("[peer]\nurl = \"http://a\"\n", "1: invalid type: map, expected `[[peer]]`, once for each peer"),
            ("peer.url = \"http://a\"\n", "1: invalid type: map, expected `[[peer]]`, once for each peer"),
            ("[[http]]\npriority = 3\n", "1: `[[http]]` stands once: single brackets"),
            ("\nhttp = []\n", "2: http: a list, expected a section: `[http]`"),
            (
                "[http]\nallow = [\n \"10.0.0.1\", # a = b\n]\n",
                "3: http.allow: invalid IP address syntax; a network reads \"10.0.0.0/8\" or \"fd00::/8\", one host \"10.0.0.1/32\"",
            ),
            ("[[peer]] # url = later\n", "1: missing field `url`"),
            ("[log]\nfilter = \"\"\"\n[x]\n\"\"\"\nformat = 5\n", "5: log.format: wanted string or table"),
            ("discovery = [false]\n", "1: discovery: a list, expected a section: `[discovery]`"),
            (
                "[resolve]\nverify_first = -1\n",
                "2: resolve.verify_first: invalid value: integer `-1`, expected a size: \"16 KiB\", or bytes from 0 on",
            ),
            (
                "[resolve]\nverify_first = \"x\"\n",
                "2: resolve.verify_first: invalid value: string \"x\", expected a size: \"16 KiB\", or bytes from 0 on",
            ),
            (
                "[discovery]\nport = 70000\n",
                "2: discovery.port: invalid value: integer `70000`, expected a whole number from 0 to 65535",
            ),
            (
                "[limits]\nrequests_per_second = -1\n",
                "2: limits.requests_per_second: invalid value: integer `-1`, expected a whole number from 0 to 4294967295",
            ),
            (
                "[cache]\nentries = -1\n",
                "2: cache.entries: invalid value: integer `-1`, expected a whole number from 0 on",
            ),
            (
                "[cache]\nentries = 99999999999999999999999\n",
                "2: cache.entries: 99999999999999999999999 is too large",
            ),
            (
                "[trust]\npublic_keys = \"a b\"\n",
                "2: trust.public_keys: invalid type: string \"a b\", expected a list in square brackets",
            ),
            (
                "[http]\npriority = 3\n  [[ peer ]] # one\nurl = 5\n",
                "4: peer.url: invalid type: integer `5`, expected a string",
            ),
        ] {
            assert_eq!(complaint(text), format!("peernix.toml:{expected}"));
        }
    }

    #[test]
    fn a_key_that_is_none_is_told_by_its_form_and_never_shown_whole() {
        let form = "; a public key reads NAME:BASE64, each in a string of its own";
        for (keys, which) in [
            ("\"c2VjcmV0\"", "entry 1 is no public key (public key has no name separator)"),
            ("\"lan-1:c2VjcmV0\"", "entry 1 (lan-1:…) is no public key ("),
            (
                "\"cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=\", \"lan-1:c2VjcmV0 \"",
                "entry 2 (lan-1:…) is no public key (public key is not valid base64)",
            ),
        ] {
            let said = complaint(&format!("[trust]\npublic_keys = [{keys}]\n"));
            assert!(said.starts_with(&format!("peernix.toml:2: trust.public_keys: {which}")), "{said}");
            assert!(said.ends_with(form) && !said.contains("c2VjcmV0"), "{said}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_configuration_or_an_error(text: String, value in "[ -~\n]{0,60}") {
            let _ = Config::parse(&text, Path::new("x"));
            for key in ["[http]\nlisten", "[http]\nallow", "[store]\nlease", "[limits]\nheader_size", "[log]\nformat"] {
                let _ = Config::parse(&format!("{key} = {value}"), Path::new("x"));
            }
        }
    }
}
