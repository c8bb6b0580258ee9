//! What a process has open, told by kind.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

/// How many descriptors it has of each kind: which ports a connection is between, where a file lies.
pub(crate) fn of_process(process: &Path) -> BTreeMap<String, u64> {
    let sockets: HashMap<String, String> =
        ["tcp", "tcp6"].into_iter().flat_map(|table| connections(&process.join("net").join(table))).collect();
    let mut kinds = BTreeMap::new();
    // One may be closed between the listing and the look.
    for descriptor in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
        let Ok(target) = fs::read_link(descriptor.path()) else { continue };
        let target = target.to_string_lossy();
        let (kind, inode) = target.split_once(":[").unwrap_or((&target, ""));
        let kind = match sockets.get(inode.trim_end_matches(']')) {
            Some(connection) => connection.clone(),
            None if target.ends_with("(deleted)") => {
                let folder = Path::new(&*target).parent().unwrap_or(Path::new("/"));
                format!("a file without a name in {}", folder.display())
            }
            None => kind.to_owned(),
        };
        *kinds.entry(kind).or_default() += 1;
    }
    kinds
}

/// The inode of each TCP socket in a table of the kernel, and between which ports it is; of those that belong to clients, only ours.
/// Daemons have lower ports than those that the system gives out.
fn connections(table: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(table).unwrap_or_default();
    let rows = text.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = |field: &str| u16::from_str_radix(field.rsplit(':').next()?, 16).ok();
        let (ours, theirs) = (port(fields.get(1)?)?, port(fields.get(2)?)?);
        let kind = match (ours, theirs) {
            (ours, 0) => format!("listening on port {ours}"),
            (ours, theirs) if theirs < ours => format!("a connection to port {theirs}"),
            (ours, _) => format!("a connection from a client to port {ours}"),
        };
        Some(((*fields.get(9)?).to_owned(), kind))
    });
    rows.collect()
}
