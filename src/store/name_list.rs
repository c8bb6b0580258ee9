//! Names as they are read from a directory, in its order.
//!
//! Taking a name in costs little beside reading it: of a large directory the first names can be asked for long before the last one
//! is there. Whoever waits for one looks through what has come since.

use std::ffi::CStr;
use std::ops::Range;
use std::path::Path;

use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::name::{is_lock, path_named};
use crate::nix::{StorePath, StorePathHash};

/// How much of a directory is asked for at once, in bytes: about a thousand names. A larger one is not read faster.
const BUFFER: usize = 64 * 1024;

/// Names that begin as those of store paths do.
#[derive(Debug, Default)]
pub(super) struct NameList {
    pub(super) names: Vec<(StorePathHash, Place)>,
    /// The names without their hash parts.
    pub(super) text: Vec<u8>,
}

/// Where something lies in a text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    start: u32,
    len: u32,
}

impl Place {
    /// `None`: it is behind 4 GiB.
    pub(super) fn new(range: Range<usize>) -> Option<Self> {
        Some(Self { start: u32::try_from(range.start).ok()?, len: u32::try_from(range.len()).ok()? })
    }

    pub(super) fn range(self) -> Range<usize> {
        let start = self.start as usize;
        start..start + self.len as usize
    }
}

impl NameList {
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    /// The store path with this hash part, if its name is among those from number `from` on. A lock is none.
    pub(super) fn path(&self, hash: &StorePathHash, from: usize) -> Option<StorePath> {
        let names = self.names.get(from..).unwrap_or_default();
        let with_hash = names.iter().filter(|(there, _)| there == hash);
        let mut paths = with_hash.filter_map(|(_, place)| path_named(hash, &self.text[place.range()]));
        paths.find(|path| !is_lock(path))
    }

    pub(super) fn append(&mut self, more: &Self) {
        for (hash, place) in &more.names {
            self.push(*hash, &more.text[place.range()]);
        }
    }

    pub(super) fn push(&mut self, hash: StorePathHash, name: &[u8]) {
        let start = self.text.len();
        // Names of 4 GiB: what comes beyond them is not known.
        let Some(place) = Place::new(start..start + name.len()) else { return };
        self.text.extend_from_slice(name);
        self.names.push((hash, place));
    }

    /// `.links` and the like do not begin as store paths do. Whether the rest is as it has to be is looked at when it is asked for.
    fn take(&mut self, name: &CStr) {
        let Some((hash, name)) = name.to_bytes().split_at_checked(StorePathHash::CHARACTERS) else { return };
        if let (Ok(hash), Some(name)) = (StorePathHash::parse(hash), name.strip_prefix(b"-")) {
            self.push(hash, name);
        }
    }

    fn clear(&mut self) {
        self.names.clear();
        self.text.clear();
    }
}

/// Reads the names in the directory, and gives them in batches. One that is not there has none; one that can't be read is an error.
pub(super) fn read_names(directory: &Path, mut give: impl FnMut(&NameList)) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::open(directory, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut buffer = Vec::with_capacity(BUFFER);
    let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
    let mut batch = NameList::default();
    while let Some(entry) = entries.next() {
        batch.take(entry?.file_name());
        if entries.is_buffer_empty() {
            give(&batch);
            batch.clear();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_read_in_batches_and_only_its_store_paths() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_names(&folder.path().join("none"), |_| panic!("a batch of nothing")).is_ok());
        std::fs::create_dir(folder.path().join(".links")).unwrap();
        let hash = |number: usize| StorePathHash::parse(format!("{number:0>32}").as_bytes()).unwrap();
        for number in 0..3000 {
            std::fs::write(folder.path().join(format!("{number:0>32}-text")), "").unwrap();
        }
        let (mut names, mut batches) = (NameList::default(), 0);
        let read = read_names(folder.path(), |batch| {
            let before = names.len();
            names.append(batch);
            // The last one of the batch, and it alone, is behind all before it.
            let (last, _) = names.names[names.len() - 1];
            assert!(names.path(&last, before).is_some() && names.path(&last, names.len()).is_none());
            batches += 1;
        });
        assert!(read.is_ok() && batches > 1);
        assert_eq!(names.len(), 3000);
        for number in 0..3000 {
            let path = names.path(&hash(number), 0).unwrap();
            assert_eq!((StorePathHash::of(&path), path.name()), (hash(number), "text"));
        }
        assert!(names.path(&hash(3000), 0).is_none());
        assert!(read_names(&folder.path().join(format!("{:0>32}-text", 0)), |_| {}).is_err());
    }
}
