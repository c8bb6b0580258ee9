//! The names that were in the store directory when the daemon ended last: a file in the state folder, one name a line in their
//! order, so that one is found without reading the rest.
//!
//! A large directory takes longer to read than `nix-store` to start. What the file says is a hint, which nobody believes before
//! the store was asked; a file that is missing, old or damaged costs a question in vain.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::nix::{StorePath, StorePathHash};

/// What is read at once, in bytes: more than twice the longest name, so that a whole line is among it.
const BLOCK: usize = 1024;

/// Where the names are remembered.
#[derive(Clone, Debug)]
pub(super) struct RememberedNames(Option<PathBuf>);

impl RememberedNames {
    /// In this folder; without one nothing is remembered.
    pub(super) fn new(state: Option<&Path>) -> Self {
        Self(state.map(|state| state.join("names")))
    }

    /// The name that a hash part had. Reads the disk.
    pub(super) fn find(&self, hash: &StorePathHash) -> Option<StorePath> {
        let file = File::open(self.0.as_deref()?).ok()?;
        find_line(&file, format!("{hash}-").as_bytes()).ok()?
    }

    /// Remembers these instead of what was remembered before.
    pub(super) fn save(&self, paths: impl Iterator<Item = StorePath>) -> io::Result<()> {
        let Some(file) = &self.0 else { return Ok(()) };
        let mut names: Vec<String> = paths.map(|path| path.to_basename()).collect();
        names.sort_unstable();
        let mut beside = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
        let mut lines = BufWriter::new(beside.as_file_mut());
        names.iter().try_for_each(|name| writeln!(lines, "{name}"))?;
        lines.flush()?;
        drop(lines);
        beside.persist(file)?;
        Ok(())
    }
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
    use super::*;

    fn path(number: u32) -> StorePath {
        // In an order of their own, with names of all lengths.
        let part = format!("{:0>32}", (number * 7919) % 10_007);
        StorePath::from_basename(format!("{part}-{}", "n".repeat(1 + number as usize % 211)).as_bytes())
            .unwrap()
    }

    #[test]
    fn every_name_is_found_again_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let names = RememberedNames::new(Some(folder.path()));
        let missing = StorePathHash::parse("z".repeat(32).as_bytes()).unwrap();
        assert!(names.find(&missing).is_none());
        for count in [0, 1, 2, 5, 30, 3000] {
            names.save((1..=count).map(path)).unwrap();
            for number in 1..=count {
                assert_eq!(names.find(&StorePathHash::of(&path(number))), Some(path(number)), "{count}");
            }
            for number in [count + 1, count + 2, count + 3000] {
                assert_eq!(names.find(&StorePathHash::of(&path(number))), None, "{count}");
            }
            assert!(names.find(&missing).is_none());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_and_no_folder_are_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let names = RememberedNames::new(Some(folder.path()));
        names.save((1..=3000).map(path)).unwrap();
        let file = folder.path().join("names");
        let good = std::fs::read(&file).unwrap();
        fastrand::seed(7);
        for _ in 0..200 {
            let mut bad = good.clone();
            bad.truncate(fastrand::usize(..good.len()));
            for _ in 0..fastrand::usize(..50) {
                let at = fastrand::usize(..=bad.len());
                bad.splice(at..at, [b'\n', 0, 0xff, b'0'].repeat(fastrand::usize(..300)));
            }
            std::fs::write(&file, &bad).unwrap();
            for _ in 0..20 {
                let hash = StorePathHash::of(&path(fastrand::u32(1..3000)));
                assert!(names.find(&hash).is_none_or(|found| StorePathHash::of(&found) == hash));
            }
        }
        let nowhere = RememberedNames::new(None);
        assert!(nowhere.save([path(1)].into_iter()).is_ok());
        assert!(nowhere.find(&StorePathHash::of(&path(1))).is_none());
    }
}
