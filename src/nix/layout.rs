//! The layout of a NAR: from the metadata of a tree, where every literal byte and every file's contents lie.
//!
//! A NAR is a pure function of its tree, so its length and any range of it are known without reading a file. The
//! layout keeps the metadata (32 bytes and the name for each entry) and writes the literal bytes on the way, so that a
//! tree of a million files costs no more than its names. It never sees a file: [`Cursor`] tells its caller when
//! the contents of one belong in.

use thiserror::Error;

use super::nar_text::{self, NarText};

/// Why a tree has no NAR.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Entries of a directory have to come in order of their bytes, each once.
    #[error("the entry {0:?} comes out of order or twice")]
    Order(String),
    /// A name that no directory can hold.
    #[error("{0:?} can't be the name of a directory's entry")]
    Name(String),
    /// More than one root, an entry outside of a directory, or a directory left open.
    #[error("the tree is not one closed tree")]
    Shape,
    /// Beyond what is bounded here ([`MAX_ENTRIES`]) or what a u64 counts.
    #[error("the tree is too large")]
    TooLarge,
}

/// The most entries of one NAR: about half a gigabyte of metadata.
pub const MAX_ENTRIES: usize = 8 * 1024 * 1024;

/// Nodes of which a layout keeps a piece.
const PIECE: usize = 1024;

/// What is said of a regular file when it is laid out, and has to hold when it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMeta {
    /// Length of its contents in bytes.
    pub size: u64,
    /// Whether its owner may execute it.
    pub executable: bool,
    /// When it was modified, in nanoseconds of the Unix clock. Not part of the NAR: it shows a change.
    pub modified_ns: i64,
}

#[derive(Clone, Copy, Debug)]
enum Entry {
    Directory,
    /// The end of the innermost open directory.
    End,
    File(FileMeta),
    Symlink {
        target_len: u16,
    },
}

#[derive(Debug)]
struct Node {
    entry: Entry,
    name_len: u8,
}

/// Nodes in pieces of [`PIECE`]: as one it would be copied into fresh memory whenever it grows.
#[derive(Debug, Default)]
struct Nodes {
    pieces: Vec<Vec<Node>>,
    len: usize,
}

impl Nodes {
    fn push(&mut self, node: Node) {
        let last = match self.pieces.last_mut() {
            Some(last) if last.len() < PIECE => last,
            // Most trees have less than a piece.
            last => {
                let capacity = if last.is_some() { PIECE } else { 0 };
                self.pieces.push_mut(Vec::with_capacity(capacity))
            }
        };
        last.push(node);
        self.len += 1;
    }

    fn get(&self, at: usize) -> Option<&Node> {
        self.pieces.get(at / PIECE)?.get(at % PIECE)
    }

    /// Takes no more memory than it needs from now on.
    fn finish(mut self) -> Self {
        self.pieces.shrink_to_fit();
        self.pieces.last_mut().into_iter().for_each(Vec::shrink_to_fit);
        self
    }
}

/// The layout of one NAR.
#[derive(Debug)]
pub struct NarLayout {
    nodes: Nodes,
    /// Names and link targets, in the order of the nodes.
    text: Box<[u8]>,
    len: u64,
}

impl NarLayout {
    /// Length of the NAR in bytes: NarSize.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no NAR is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// How many files, links and directories it has; the ends of directories count too.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.nodes.len as u64
    }

    /// About how many bytes it holds in memory.
    #[must_use]
    pub fn weight(&self) -> usize {
        size_of::<Self>() + self.nodes.len * size_of::<Node>() + self.text.len()
    }
}

/// Takes the entries of a tree in the order of a NAR: depth first, each directory's entries sorted by their bytes.
#[derive(Debug, Default)]
pub struct LayoutBuilder {
    nodes: Nodes,
    text: Vec<u8>,
    len: u64,
    /// For each open directory where the name of its latest entry lies in `text`.
    open: Vec<Option<(usize, usize)>>,
}

impl LayoutBuilder {
    /// Opens a directory; the root has the empty name.
    pub fn directory(&mut self, name: &[u8]) -> Result<(), LayoutError> {
        self.push(name, Entry::Directory)?;
        self.open.push(None);
        Ok(())
    }

    /// Closes the directory that was opened last.
    pub fn end(&mut self) -> Result<(), LayoutError> {
        self.open.pop().ok_or(LayoutError::Shape)?;
        self.close()?;
        self.nodes.push(Node { entry: Entry::End, name_len: 0 });
        Ok(())
    }

    /// A regular file.
    pub fn file(&mut self, name: &[u8], meta: FileMeta) -> Result<(), LayoutError> {
        self.push(name, Entry::File(meta))?;
        let padded = meta.size.checked_next_multiple_of(8).ok_or(LayoutError::TooLarge)?;
        self.len = self.len.checked_add(padded).ok_or(LayoutError::TooLarge)?;
        self.close()
    }

    /// A symbolic link.
    pub fn symlink(&mut self, name: &[u8], target: &[u8]) -> Result<(), LayoutError> {
        let target_len = u16::try_from(target.len()).map_err(|_| LayoutError::TooLarge)?;
        self.push(name, Entry::Symlink { target_len })?;
        self.text.extend_from_slice(target);
        self.add(&[target])?;
        self.close()
    }

    /// The finished layout.
    pub fn finish(self) -> Result<NarLayout, LayoutError> {
        if self.nodes.len == 0 || !self.open.is_empty() {
            return Err(LayoutError::Shape);
        }
        Ok(NarLayout { nodes: self.nodes.finish(), text: self.text.into_boxed_slice(), len: self.len })
    }

    fn push(&mut self, name: &[u8], entry: Entry) -> Result<(), LayoutError> {
        let shown = || String::from_utf8_lossy(name).into_owned();
        let name_len = u8::try_from(name.len()).map_err(|_| LayoutError::Name(shown()))?;
        if self.nodes.len >= MAX_ENTRIES {
            return Err(LayoutError::TooLarge);
        }
        if self.nodes.len == 0 {
            if !name.is_empty() {
                return Err(LayoutError::Shape);
            }
            self.add(nar_text::OPEN_ROOT)?;
        } else {
            let latest = self.open.last_mut().ok_or(LayoutError::Shape)?;
            if matches!(name, b"" | b"." | b"..") || name.iter().any(|b| matches!(b, b'/' | 0)) {
                return Err(LayoutError::Name(shown()));
            }
            if latest.is_some_and(|(at, len)| self.text[at..at + len] >= *name) {
                return Err(LayoutError::Order(shown()));
            }
            *latest = Some((self.text.len(), name.len()));
            self.text.extend_from_slice(name);
            self.add(&nar_text::open(name))?;
        }
        self.add(kind_strings(entry))?;
        if matches!(entry, Entry::File(_)) {
            self.len = self.len.checked_add(8).ok_or(LayoutError::TooLarge)?;
        }
        self.nodes.push(Node { entry, name_len });
        Ok(())
    }

    fn close(&mut self) -> Result<(), LayoutError> {
        self.add(if self.open.is_empty() { nar_text::CLOSE_ROOT } else { nar_text::CLOSE })
    }

    fn add(&mut self, strings: &[&[u8]]) -> Result<(), LayoutError> {
        self.len = self.len.checked_add(nar_text::len(strings)).ok_or(LayoutError::TooLarge)?;
        Ok(())
    }
}

/// What follows the opening parenthesis of a node, up to where its own data begin.
fn kind_strings(entry: Entry) -> &'static [&'static [u8]] {
    match entry {
        Entry::Directory => nar_text::DIRECTORY,
        Entry::File(meta) => nar_text::file(meta.executable),
        Entry::Symlink { .. } => nar_text::SYMLINK,
        Entry::End => &[],
    }
}

/// What comes after the literal bytes that a call of [`Cursor::advance`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// A directory of this name opens (the root's is empty). Its contents follow.
    Enter(&'a [u8]),
    /// The innermost open directory closes.
    Leave,
    /// The contents of this file belong here, `size` bytes of them.
    File {
        /// Its name in the open directory; empty if it is the root.
        name: &'a [u8],
        /// What it was when it was laid out.
        meta: FileMeta,
    },
    /// A symbolic link; all of it was written.
    Symlink {
        /// Its name in the open directory; empty if it is the root.
        name: &'a [u8],
        /// What it points to.
        target: &'a [u8],
    },
    /// The NAR is complete.
    Finished,
}

/// A place in a layout, moved from its beginning to its end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor {
    node: usize,
    text: usize,
    literals: NarText,
    /// The length of the file that the last step named.
    after_file: Option<u64>,
}

impl Cursor {
    /// Appends the literal bytes up to the next step and says what it is. Always with the same layout.
    pub fn advance<'a>(&mut self, layout: &'a NarLayout, out: &mut Vec<u8>) -> Step<'a> {
        if let Some(size) = self.after_file.take() {
            self.literals.file_end(size, out);
        }
        let Some(node) = layout.nodes.get(self.node) else { return Step::Finished };
        let name = self.take_text(layout, usize::from(node.name_len));
        self.node += 1;
        match node.entry {
            Entry::Directory => {
                self.literals.directory(name, out);
                Step::Enter(name)
            }
            Entry::End => {
                self.literals.end(out);
                Step::Leave
            }
            Entry::File(meta) => {
                self.literals.file(name, meta.size, meta.executable, out);
                self.after_file = Some(meta.size);
                Step::File { name, meta }
            }
            Entry::Symlink { target_len } => {
                let target = self.take_text(layout, usize::from(target_len));
                self.literals.symlink(name, target, out);
                Step::Symlink { name, target }
            }
        }
    }

    fn take_text<'a>(&mut self, layout: &'a NarLayout, len: usize) -> &'a [u8] {
        let text = layout.text.get(self.text..self.text + len).unwrap_or_default();
        self.text += len;
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::nar_text::put;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Tree {
        File(Vec<u8>, bool),
        Symlink(Vec<u8>),
        Directory(BTreeMap<Vec<u8>, Tree>),
    }

    fn any_tree() -> impl Strategy<Value = Tree> {
        let leaf = prop_oneof![
            (prop::collection::vec(any::<u8>(), 0..40), any::<bool>()).prop_map(|(c, x)| Tree::File(c, x)),
            prop::collection::vec(1u8.., 1..40).prop_map(Tree::Symlink),
        ];
        let name = prop::collection::vec(any::<u8>(), 1..20).prop_filter("a name", |name| {
            !name.iter().any(|b| matches!(b, b'/' | 0)) && !matches!(&name[..], b"." | b"..")
        });
        leaf.prop_recursive(5, 40, 6, move |inner| {
            prop::collection::btree_map(name.clone(), inner, 0..6).prop_map(Tree::Directory)
        })
    }

    fn lay_out(tree: &Tree, name: &[u8], builder: &mut LayoutBuilder, files: &mut Vec<Vec<u8>>) {
        match tree {
            Tree::File(contents, executable) => {
                let meta = FileMeta { size: contents.len() as u64, executable: *executable, modified_ns: 0 };
                builder.file(name, meta).unwrap();
                files.push(contents.clone());
            }
            Tree::Symlink(target) => builder.symlink(name, target).unwrap(),
            Tree::Directory(entries) => {
                builder.directory(name).unwrap();
                for (name, tree) in entries {
                    lay_out(tree, name, builder, files);
                }
                builder.end().unwrap();
            }
        }
    }

    /// The definition of a NAR, written down a second time, recursively.
    fn expected(tree: &Tree, out: &mut Vec<u8>) {
        put(out, &[b"("]);
        match tree {
            Tree::File(contents, executable) => {
                put(out, &[b"type", b"regular"]);
                if *executable {
                    put(out, &[b"executable", b""]);
                }
                put(out, &[b"contents", contents]);
            }
            Tree::Symlink(target) => put(out, &[b"type", b"symlink", b"target", target]),
            Tree::Directory(entries) => {
                put(out, &[b"type", b"directory"]);
                for (name, tree) in entries {
                    put(out, &[b"entry", b"(", b"name", name, b"node"]);
                    expected(tree, out);
                    put(out, &[b")"]);
                }
            }
        }
        put(out, &[b")"]);
    }

    #[test]
    fn trees_that_are_none_are_refused() {
        let mut twice = LayoutBuilder::default();
        twice.directory(b"").unwrap();
        twice.symlink(b"b", b"x").unwrap();
        assert!(matches!(twice.symlink(b"b", b"x"), Err(LayoutError::Order(_))));
        assert!(matches!(twice.symlink(b"a", b"x"), Err(LayoutError::Order(_))));
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0"] {
            assert!(matches!(twice.symlink(name, b"x"), Err(LayoutError::Name(_))), "{name:?}");
        }
        assert!(matches!(twice.finish(), Err(LayoutError::Shape)));
        assert!(matches!(LayoutBuilder::default().finish(), Err(LayoutError::Shape)));
        let mut two_roots = LayoutBuilder::default();
        two_roots.symlink(b"", b"x").unwrap();
        assert!(matches!(two_roots.symlink(b"b", b"x"), Err(LayoutError::Shape)));
        let huge = FileMeta { size: u64::MAX - 1, executable: false, modified_ns: 0 };
        assert_eq!(LayoutBuilder::default().file(b"", huge), Err(LayoutError::TooLarge));
    }

    proptest! {
        #[test]
        fn a_layout_writes_the_nar_of_its_tree(tree in any_tree()) {
            let (mut builder, mut files) = (LayoutBuilder::default(), Vec::new());
            lay_out(&tree, b"", &mut builder, &mut files);
            let layout = builder.finish().unwrap();
            let (mut cursor, mut out, mut files) = (Cursor::default(), Vec::new(), files.into_iter());
            let mut depth = 0;
            loop {
                match cursor.advance(&layout, &mut out) {
                    Step::Enter(_) => depth += 1,
                    Step::Leave => depth -= 1,
                    Step::File { .. } => out.extend(files.next().unwrap()),
                    Step::Symlink { .. } => {}
                    Step::Finished => break,
                }
            }
            prop_assert_eq!(depth, 0);
            let mut nar = Vec::new();
            put(&mut nar, &[b"nix-archive-1"]);
            expected(&tree, &mut nar);
            prop_assert_eq!(layout.len(), nar.len() as u64);
            prop_assert!(out == nar);
        }
    }
}
