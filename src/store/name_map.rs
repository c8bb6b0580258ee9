//! Names by hash part, and how a directory's are read.
//!
//! A path and its `.lock` share a hash part, so there may be several names to one; mostly there is one, which then takes one
//! allocation.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CStr;
use std::path::Path;

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;

use crate::nix::{StorePath, StorePathHash};

/// How much of a directory is asked for at once, in bytes: about a thousand names. A larger one is not read faster.
const BUFFER: usize = 64 * 1024;
/// Between the names of one hash part. No name has it in it.
const BETWEEN: char = '/';

/// Names without their hash parts, by these.
#[derive(Debug, Default)]
pub(super) struct NameMap(HashMap<StorePathHash, Box<str>>);

impl NameMap {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn hashes(&self) -> impl Iterator<Item = &StorePathHash> {
        self.0.keys()
    }

    pub(super) fn contains(&self, hash: &StorePathHash) -> bool {
        self.0.contains_key(hash)
    }

    /// With the shortest name, which is the path's; the longer ones are its lock's and its like.
    pub(super) fn path(&self, hash: &StorePathHash) -> Option<StorePath> {
        let name = each(self.0.get(hash)?).min_by_key(|name| name.len())?;
        StorePath::from_basename(format!("{hash}-{name}").as_bytes()).ok()
    }

    pub(super) fn insert(&mut self, path: &StorePath) {
        match self.0.entry(StorePathHash::of(path)) {
            Entry::Vacant(vacant) => {
                vacant.insert(path.name().into());
            }
            Entry::Occupied(mut there) => {
                if !each(there.get()).any(|name| name == path.name()) {
                    let both = format!("{}{BETWEEN}{}", there.get(), path.name());
                    there.insert(both.into());
                }
            }
        }
    }

    pub(super) fn remove(&mut self, path: &StorePath) {
        let Entry::Occupied(mut there) = self.0.entry(StorePathHash::of(path)) else { return };
        let mut rest = String::new();
        for name in each(there.get()).filter(|name| *name != path.name()) {
            if !rest.is_empty() {
                rest.push(BETWEEN);
            }
            rest.push_str(name);
        }
        if rest.is_empty() {
            there.remove();
        } else {
            there.insert(rest.into());
        }
    }

    /// The hash parts with a name that was not there before.
    pub(super) fn came_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a StorePathHash> {
        let is_new = |hash: &StorePathHash, now: &str| {
            let Some(before) = before.0.get(hash) else { return true };
            *now != **before && each(now).any(|name| each(before).all(|before| before != name))
        };
        self.0.iter().filter(move |(hash, now)| is_new(hash, now)).map(|(hash, _)| hash)
    }
}

fn each(names: &str) -> impl Iterator<Item = &str> {
    names.split(BETWEEN)
}

/// Whether Nix locks a path by this name, which it has while that is made, and sometimes longer.
pub(super) fn is_lock(path: &StorePath) -> bool {
    path.name().ends_with(".lock")
}

/// `.links`, temporary files and the like are no store paths.
pub(super) fn store_path(name: &CStr) -> Option<StorePath> {
    StorePath::from_basename(name.to_bytes()).ok()
}

/// Reads the names in the directory, and gives them in batches. One that is not there has none; one that can't be read is an error.
pub(super) fn read_names(directory: &Path, mut batch: impl FnMut(&[StorePath])) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::open(directory, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut buffer = Vec::with_capacity(BUFFER);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut paths = Vec::new();
    while let Some(entry) = entries.next() {
        paths.extend(store_path(entry?.file_name()));
        if entries.is_buffer_empty() {
            batch(&paths);
            paths.clear();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(digit: char, name: &str) -> StorePath {
        let part = digit.to_string().repeat(32);
        StorePath::from_basename(format!("{part}-{name}").as_bytes()).unwrap()
    }

    #[test]
    fn a_path_and_its_lock_come_and_go_each_by_itself() {
        let (text, lock) = (path('0', "text"), path('0', "text.lock"));
        let hash = StorePathHash::of(&text);
        let mut names = NameMap::default();
        names.insert(&lock);
        assert_eq!(names.path(&hash).as_ref(), Some(&lock));
        for _ in 0..2 {
            names.insert(&text);
        }
        assert_eq!((names.path(&hash).as_ref(), names.len()), (Some(&text), 1));
        names.remove(&lock);
        names.remove(&lock);
        assert_eq!(names.path(&hash).as_ref(), Some(&text));
        names.remove(&text);
        assert!(!names.contains(&hash) && names.len() == 0);
    }

    #[test]
    fn what_came_is_a_name_that_was_not_there() {
        let (mut before, mut now) = (NameMap::default(), NameMap::default());
        let (same, lock, text) = (path('0', "same"), path('1', "text.lock"), path('1', "text"));
        // In another order, and one that went.
        for path in [&same, &path('0', "same.lock"), &lock, &path('2', "gone")] {
            before.insert(path);
        }
        for path in [&path('0', "same.lock"), &same, &text, &path('3', "fresh")] {
            now.insert(path);
        }
        let mut came: Vec<_> = now.came_since(&before).copied().collect();
        came.sort_unstable();
        assert_eq!(came, [StorePathHash::of(&text), StorePathHash::of(&path('3', "fresh"))]);
    }

    #[test]
    fn a_directory_is_read_in_batches_and_only_its_store_paths() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_names(&folder.path().join("none"), |_| panic!("a batch of nothing")).is_ok());
        std::fs::create_dir(folder.path().join(".links")).unwrap();
        for number in 0..3000 {
            std::fs::write(folder.path().join(format!("{number:0>32}-text")), "").unwrap();
        }
        let (mut names, mut batches) = (NameMap::default(), 0);
        let read = read_names(folder.path(), |paths| {
            paths.iter().for_each(|path| names.insert(path));
            batches += 1;
        });
        assert!(read.is_ok() && batches > 1);
        assert_eq!(names.len(), 3000);
        assert!(read_names(&folder.path().join(format!("{:0>32}-text", 0)), |_| {}).is_err());
    }
}
