//! Names by hash part.
//!
//! A path and its `.lock` share a hash part, so there may be several names to one. A store has hundreds of thousands: their names
//! lie in one text.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::name::path_named;
use super::name_list::{NameList, Place};
use crate::nix::{StorePath, StorePathHash};

/// Between the names of one hash part. No name has it in it.
const BETWEEN: u8 = b'/';

/// Names without their hash parts, by these.
#[derive(Debug, Default)]
pub(super) struct NameMap {
    places: HashMap<StorePathHash, Place>,
    text: Vec<u8>,
    /// How much of the text is nobody's any more.
    waste: usize,
}

impl From<NameList> for NameMap {
    fn from(list: NameList) -> Self {
        let NameList { names, text } = list;
        let mut map = Self { places: HashMap::with_capacity(names.len()), text, waste: 0 };
        for (hash, place) in names {
            if path_named(&hash, &map.text[place.range()]).is_some() {
                map.put(hash, place);
            } else {
                map.waste += place.range().len();
            }
        }
        map.tidy();
        map
    }
}

impl NameMap {
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn hashes(&self) -> impl Iterator<Item = &StorePathHash> {
        self.places.keys()
    }

    pub(super) fn contains(&self, hash: &StorePathHash) -> bool {
        self.places.contains_key(hash)
    }

    /// With the shortest name, which is the path's; the longer ones are its lock's and its like.
    pub(super) fn path(&self, hash: &StorePathHash) -> Option<StorePath> {
        let paths = self.names(hash).filter_map(|name| path_named(hash, name));
        paths.min_by_key(|path| path.name().len())
    }

    pub(super) fn insert(&mut self, path: &StorePath) {
        let (hash, name) = (StorePathHash::of(path), path.name().as_bytes());
        if self.names(&hash).any(|there| there == name) {
            return;
        }
        let start = self.text.len();
        // Names of 4 GiB: what comes beyond them is not known.
        let Some(place) = Place::new(start..start + name.len()) else { return };
        self.text.extend_from_slice(name);
        self.put(hash, place);
        self.tidy();
    }

    /// Adds a name that is in the text already.
    fn put(&mut self, hash: StorePathHash, place: Place) {
        let mut there = match self.places.entry(hash) {
            Entry::Vacant(vacant) => {
                vacant.insert(place);
                return;
            }
            Entry::Occupied(there) => there,
        };
        let (before, name) = (there.get().range(), place.range());
        self.waste += name.len();
        if each(&self.text[before.clone()]).any(|there| *there == self.text[name.clone()]) {
            return;
        }
        let start = self.text.len();
        self.text.extend_from_within(before.clone());
        self.text.push(BETWEEN);
        self.text.extend_from_within(name);
        match Place::new(start..self.text.len()) {
            Some(both) => {
                there.insert(both);
                self.waste += before.len();
            }
            None => self.text.truncate(start),
        }
    }

    pub(super) fn remove(&mut self, path: &StorePath) {
        let Entry::Occupied(mut there) = self.places.entry(StorePathHash::of(path)) else { return };
        let before = there.get().range();
        let is_other = |name: &&[u8]| *name != path.name().as_bytes();
        let rest: Vec<&[u8]> = each(&self.text[before.clone()]).filter(is_other).collect();
        let rest = rest.join(&BETWEEN);
        // Fewer than before, which have room where those were.
        match Place::new(before.start..before.start + rest.len()) {
            Some(place) if !rest.is_empty() => {
                self.text[place.range()].copy_from_slice(&rest);
                there.insert(place);
            }
            _ => _ = there.remove(),
        }
        self.waste += before.len() - rest.len();
        self.tidy();
    }

    /// The hash parts with a name that was not there before.
    pub(super) fn came_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a StorePathHash> {
        let is_new = |hash: &StorePathHash| {
            self.names(hash).any(|name| before.names(hash).all(|before| before != name))
        };
        self.hashes().filter(move |hash| is_new(hash))
    }

    fn names(&self, hash: &StorePathHash) -> impl Iterator<Item = &[u8]> {
        self.places.get(hash).into_iter().flat_map(|place| each(&self.text[place.range()]))
    }

    /// Moves the names together if more than half of the text is waste.
    fn tidy(&mut self) {
        if self.waste <= self.text.len() / 2 {
            return;
        }
        let before = std::mem::take(&mut self.text);
        for place in self.places.values_mut() {
            let start = self.text.len();
            self.text.extend_from_slice(&before[place.range()]);
            // It was within bounds when there was more.
            if let Some(moved) = Place::new(start..self.text.len()) {
                *place = moved;
            }
        }
        self.waste = 0;
    }
}

fn each(names: &[u8]) -> impl Iterator<Item = &[u8]> {
    names.split(|byte| *byte == BETWEEN)
}

#[cfg(test)]
mod tests {
    use super::super::name_list::read_names;
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
    fn what_is_removed_leaves_no_waste_behind_for_long() {
        let mut names = NameMap::default();
        let hash = |number: usize| StorePathHash::of(&numbered(number, ""));
        let mut longest = 0;
        for number in 0..3000 {
            names.insert(&numbered(number, ""));
            names.insert(&numbered(number, ".lock"));
            names.remove(&numbered(number, ".lock"));
            if number >= 100 {
                names.remove(&numbered(number - 100, ""));
            }
            longest = longest.max(names.text.len());
        }
        assert_eq!(names.len(), 100);
        for number in 0..3000 {
            let expected = (number >= 2900).then(|| numbered(number, ""));
            assert_eq!(names.path(&hash(number)), expected);
        }
        // Twice what 100 names take, and what one change adds.
        let most = 2 * 100 * "number-2999".len() + 100;
        assert!(longest <= most, "{longest}");
        for _ in 0..3000 {
            names.insert(&numbered(2999, ""));
        }
        for end in 0..3000 {
            names.insert(&numbered(2999, &format!(".{end}")));
            names.remove(&numbered(2999, &format!(".{end}")));
        }
        assert!(names.text.len() <= most, "{}", names.text.len());
    }

    fn numbered(number: usize, end: &str) -> StorePath {
        let name = format!("{number:0>32}-number-{number}{end}");
        StorePath::from_basename(name.as_bytes()).unwrap()
    }

    #[test]
    fn a_name_that_no_store_path_has_is_in_nobodys_way() {
        let folder = tempfile::tempdir().unwrap();
        let part = "0".repeat(32);
        for name in ["a!", "long enough", "text", "", "\u{e4}"] {
            std::fs::write(folder.path().join(format!("{part}-{name}")), "").unwrap();
        }
        let bad = "1".repeat(32);
        std::fs::write(folder.path().join(format!("{bad}-a!")), "").unwrap();
        std::fs::write(folder.path().join(&part), "").unwrap();
        let mut list = NameList::default();
        read_names(folder.path(), |batch| list.append(batch)).unwrap();
        let hash = |part: &str| StorePathHash::parse(part.as_bytes()).unwrap();
        assert_eq!(list.path(&hash(&part), 0), Some(path('0', "text")));
        assert_eq!(list.path(&hash(&bad), 0), None);
        let names = NameMap::from(list);
        assert_eq!(names.path(&hash(&part)), Some(path('0', "text")));
        assert!(names.len() == 1 && !names.contains(&hash(&bad)));
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
}
