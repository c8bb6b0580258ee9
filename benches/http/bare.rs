//! What the files of a path cost the kernel, whoever serves them: each is opened, looked at, read and closed, by all processors.

use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, RawDir, fstat, openat};

/// Longer than any of the files, in bytes.
const BUFFER: usize = 64 * 1024;

/// The time that all files in the folders of a path take.
pub(crate) fn read_files(path: &Path) -> Duration {
    let began = Instant::now();
    let folders: Vec<PathBuf> =
        std::fs::read_dir(path).expect("a path").map(|entry| entry.expect("a folder").path()).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let next = || folders.get(next.fetch_add(1, Ordering::Relaxed));
        std::iter::from_fn(next).for_each(|folder| read_folder(folder));
    };
    let threads = std::thread::available_parallelism().expect("processors").get();
    std::thread::scope(|scope| (0..threads).for_each(|_| _ = scope.spawn(work)));
    began.elapsed()
}

fn read_folder(folder: &Path) {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let folder = openat(CWD, folder, flags | OFlags::DIRECTORY, Mode::empty()).expect("a folder");
    let mut names = [MaybeUninit::uninit(); BUFFER];
    let mut names = RawDir::new(&folder, &mut names);
    let mut buffer = vec![0; BUFFER];
    while let Some(name) = names.next() {
        let name = name.expect("a name");
        if matches!(name.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let file = openat(&folder, name.file_name(), flags, Mode::empty()).expect("a file");
        let size = fstat(&file).expect("its size").st_size as u64;
        let read = rustix::io::read(&file, &mut buffer).expect("its bytes") as u64;
        assert_eq!(read, size, "a whole file");
    }
}
