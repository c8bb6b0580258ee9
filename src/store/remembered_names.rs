//! The names that were in the store directory when the daemon ended last: a file in the state folder, one name a line in their
//! order, so that one is found without reading the rest.
//!
//! A large directory takes longer to read than `nix-store` to start. What the file says is a hint, which nobody believes before
//! the store was asked; a file that is missing, old or damaged costs a question in vain.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::nix::{StorePath, StorePathHash};

/// What is read at once, in bytes: more than twice the longest name, so that a whole line is among it.
const BLOCK: usize = 1024;

/// Names that are looked for at the same time: a disk that does not answer keeps so many threads and no more.
const AT_ONCE: usize = 4;

/// Where the names are remembered.
#[derive(Clone, Debug)]
pub(super) struct RememberedNames {
    file: Option<PathBuf>,
    places: Arc<Semaphore>,
}

impl RememberedNames {
    /// In this folder; without one nothing is remembered.
    pub(super) fn new(state: Option<&Path>) -> Self {
        let file = state.map(|state| state.join("names"));
        Self { file, places: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// The name that a hash part had. `None` also where it would have to be waited for others.
    pub(super) async fn find(&self, hash: &StorePathHash) -> Option<StorePath> {
        let (file, hash) = (self.file.clone()?, *hash);
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let found = spawn_blocking(move || {
            let found = find_in(&file, &hash);
            drop(place);
            found
        });
        found.await.ok()?
    }

    /// Remembers these instead of what was remembered before. A path that has gone meanwhile is `None`. Blocking.
    pub(super) fn save(
        &self,
        mut hashes: Vec<StorePathHash>,
        path: impl Fn(&StorePathHash) -> Option<StorePath>,
    ) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        // In the order of their characters, of which the first ones are in the last byte.
        hashes.sort_unstable_by(|one, other| one.as_bytes().iter().rev().cmp(other.as_bytes().iter().rev()));
        let mut beside = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
        let mut lines = BufWriter::new(beside.as_file_mut());
        for path in hashes.iter().filter_map(path) {
            writeln!(lines, "{}", path.to_basename())?;
        }
        lines.flush()?;
        drop(lines);
        beside.persist(file)?;
        Ok(())
    }
}

fn find_in(file: &Path, hash: &StorePathHash) -> Option<StorePath> {
    // A pipe in its place would block the open itself.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(file, flags, Mode::empty()).ok()?);
    file.metadata().ok()?.is_file().then_some(())?;
    find_line(&file, format!("{hash}-").as_bytes()).ok()?
}

/// The line that begins so.
fn find_line(file: &File, begin: &[u8]) -> io::Result<Option<StorePath>> {
    // The line begins in this range, if there is one. `from` is where a line begins.
    let (mut from, mut to) = (0, file.metadata()?.len());
    let mut block = [0; BLOCK];
    while to.saturating_sub(from) > BLOCK as u64 {
        let middle = from + (to - from) / 2;
        let read = read_at(file, &mut block, middle)?;
        let Some(end) = block[..read].iter().position(|byte| *byte == b'\n') else { return Ok(None) };
        let line = &block[end + 1..read];
        let is_behind = line.get(..begin.len()).is_none_or(|line| line > begin);
        (from, to) = if is_behind { (from, middle + 1) } else { (middle + end as u64 + 1, to) };
    }
    let mut last = [0; 2 * BLOCK];
    let read = read_at(file, &mut last, from)?;
    let line = last[..read].split(|byte| *byte == b'\n').find(|line| line.starts_with(begin));
    Ok(line.and_then(|line| StorePath::from_basename(line).ok()))
}

fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn path(number: u32) -> StorePath {
        // In an order of their own, with names of all lengths.
        let part = format!("{:0>32}", (number * 7919) % 10_007);
        StorePath::from_basename(format!("{part}-{}", "n".repeat(1 + number as usize % 211)).as_bytes())
            .unwrap()
    }

    fn save(names: &RememberedNames, paths: impl Iterator<Item = StorePath>) {
        let paths: HashMap<_, _> = paths.map(|path| (StorePathHash::of(&path), path)).collect();
        names.save(paths.keys().copied().collect(), |hash| paths.get(hash).cloned()).unwrap();
    }

    #[tokio::test]
    async fn every_name_is_found_again_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let names = RememberedNames::new(Some(folder.path()));
        let missing = StorePathHash::parse("z".repeat(32).as_bytes()).unwrap();
        assert!(names.find(&missing).await.is_none());
        for count in [0, 1, 2, 5, 30, 3000] {
            save(&names, (1..=count).map(path));
            for number in 1..=count {
                assert_eq!(
                    names.find(&StorePathHash::of(&path(number))).await,
                    Some(path(number)),
                    "{count}"
                );
            }
            for number in [count + 1, count + 2, count + 3000] {
                assert_eq!(names.find(&StorePathHash::of(&path(number))).await, None, "{count}");
            }
            assert!(names.find(&missing).await.is_none());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn of_a_file_that_was_cut_off_the_rest_is_found_and_none_without_end_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let names = RememberedNames::new(Some(folder.path()));
        save(&names, (1..=3000).map(path));
        let file = folder.path().join("names");
        let good = std::fs::read(&file).unwrap();
        let lines: Vec<&[u8]> = good.split_inclusive(|byte| *byte == b'\n').collect();
        let find = async |line: &[u8]| names.find(&StorePathHash::parse(&line[..32]).unwrap()).await;
        for kept in [1, 10, 1500, 2999] {
            let mut cut = lines[..kept].concat();
            cut.extend_from_slice(&lines[kept][..20]);
            std::fs::write(&file, &cut).unwrap();
            for line in &lines[..kept] {
                let found = find(line).await.unwrap();
                assert_eq!(found.to_basename().as_bytes(), line.trim_ascii());
            }
            assert!(find(lines[kept]).await.is_none());
        }
        // Whatever stands in it is looked through in few steps, and comes to its end.
        fastrand::seed(7);
        for _ in 0..200 {
            let mut bad = good.clone();
            for _ in 0..fastrand::usize(..50) {
                let at = fastrand::usize(..=bad.len());
                bad.splice(at..at, [b'\n', 0, 0xff, b'0'].repeat(fastrand::usize(..300)));
            }
            std::fs::write(&file, &bad).unwrap();
            find(lines[fastrand::usize(..3000)]).await;
        }
        std::fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(find(lines[0]).await.is_none());
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert!(find(lines[0]).await.is_none());
        assert!(RememberedNames::new(None).find(&StorePathHash::of(&path(1))).await.is_none());
    }

    #[tokio::test]
    async fn who_finds_no_place_does_not_wait() {
        let folder = tempfile::tempdir().unwrap();
        let names = RememberedNames::new(Some(folder.path()));
        save(&names, [path(1)].into_iter());
        let hash = StorePathHash::of(&path(1));
        let places = names.places.acquire_many(AT_ONCE as u32).await.unwrap();
        assert!(names.find(&hash).await.is_none());
        drop(places);
        assert!(names.find(&hash).await.is_some());
    }
}
