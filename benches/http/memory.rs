//! Files brought into memory in the same way for both servers.
//!
//! However they came there before: what was written a little at a time, or taken back and read again here and there, is kept in many
//! small pieces, which take longer to send than few large ones. Machines that take back what nobody has read for half a minute
//! make more and more of them.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{Advice, fadvise, syncfs};

/// What a process, or "self", has read from the disk until now, in bytes.
pub(crate) fn read_from_disk(process: &str) -> u64 {
    let counts = std::fs::read_to_string(format!("/proc/{process}/io")).expect("what it has read");
    let line = counts.lines().find_map(|line| line.strip_prefix("read_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).expect("bytes")
}

/// Has everything on this file system written: nothing else can leave the memory.
pub(crate) fn write_back(path: &Path) {
    let folder = File::open(path).expect("a folder");
    syncfs(folder).expect("a disk that takes it");
}

/// Reads a file, or all that are in a folder, from the disk, as far as the kernel had let go of them, and then once more: the first
/// to use again what was read once has the kernel note that, page by page, which is no part of serving from a warm cache.
pub(crate) fn read_anew(path: &Path) {
    each_file(path, &|file| fadvise(file, 0, None, Advice::DontNeed).expect("advice"));
    each_file(path, &|_| ());
}

/// Reads each file behind what is done with it.
fn each_file(path: &Path, first: &dyn Fn(&File)) {
    let meta = path.symlink_metadata().expect("a path");
    if meta.is_dir() {
        let entries = path.read_dir().expect("a folder");
        entries.for_each(|entry| each_file(&entry.expect("a name").path(), first));
    } else if meta.is_file() {
        let mut file = File::open(path).expect("a file");
        first(&file);
        let mut pieces = io::BufWriter::with_capacity(1024 * 1024, io::sink());
        io::copy(&mut file, &mut pieces).expect("its bytes");
    }
}
