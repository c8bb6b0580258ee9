//! The environment in which systemd starts the daemon: what it takes is measured as its users run it.

/// How systemd starts the daemon.
const UNIT: &str = include_str!("../../config/peernix.service");

/// What the unit sets, but for the home folder, which systemd fills in.
pub(crate) fn environment() -> impl Iterator<Item = (&'static str, &'static str)> {
    let set = UNIT.lines().filter_map(|line| line.strip_prefix("Environment="));
    let set = set.flat_map(str::split_whitespace).filter_map(|set| set.split_once('='));
    set.filter(|(name, _)| *name != "HOME")
}
