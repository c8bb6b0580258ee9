//! The literal bytes of a NAR: everything but the contents of its files.

const MAGIC: &[u8] = b"nix-archive-1";

/// What follows the opening parenthesis of a node, by its kind.
pub(super) const DIRECTORY: &[&[u8]] = &[b"type", b"directory"];
pub(super) const SYMLINK: &[&[u8]] = &[b"type", b"symlink", b"target"];
pub(super) const FILE: &[&[u8]] = &[b"type", b"regular", b"contents"];
pub(super) const EXECUTABLE: &[&[u8]] = &[b"type", b"regular", b"executable", b"", b"contents"];
/// What opens and closes the root, and what closes any other entry. (What opens that has its name in it.)
pub(super) const OPEN_ROOT: &[&[u8]] = &[MAGIC, b"("];
pub(super) const CLOSE_ROOT: &[&[u8]] = &[b")"];
pub(super) const CLOSE: &[&[u8]] = &[b")", b")"];

/// What opens an entry of a directory.
pub(super) fn open(name: &[u8]) -> [&[u8]; 6] {
    [b"entry", b"(", b"name", name, b"node", b"("]
}

/// The kind of a regular file.
pub(super) fn file(executable: bool) -> &'static [&'static [u8]] {
    if executable { EXECUTABLE } else { FILE }
}

/// How many zeros follow so many bytes.
fn padding(bytes: u64) -> usize {
    (bytes.wrapping_neg() % 8) as usize
}

/// How many bytes the strings take in a NAR.
pub(super) fn len(strings: &[&[u8]]) -> u64 {
    strings.iter().map(|string| 8 + (string.len() + padding(string.len() as u64)) as u64).sum()
}

/// Appends the literal bytes of one node after the other, in the order of a NAR. Names and order are not looked at: a
/// [`LayoutBuilder`](super::layout::LayoutBuilder) does.
#[derive(Clone, Copy, Debug, Default)]
pub struct NarText {
    depth: usize,
}

impl NarText {
    /// Goes on in a directory that lies so deep; the root's entries have depth 1.
    #[must_use]
    pub fn at_depth(depth: usize) -> Self {
        Self { depth }
    }

    /// Opens a directory; the name of the root does not matter.
    pub fn directory(&mut self, name: &[u8], out: &mut Vec<u8>) {
        self.open(name, out);
        put(out, DIRECTORY);
        self.depth += 1;
    }

    /// Closes the directory that was opened last.
    pub fn end(&mut self, out: &mut Vec<u8>) {
        self.depth = self.depth.saturating_sub(1);
        self.close(out);
    }

    /// Opens a regular file: its contents, of `size` bytes, belong behind this.
    pub fn file(&self, name: &[u8], size: u64, executable: bool, out: &mut Vec<u8>) {
        self.open(name, out);
        put(out, file(executable));
        out.extend_from_slice(&size.to_le_bytes());
    }

    /// Closes a regular file, of `size` bytes.
    pub fn file_end(&self, size: u64, out: &mut Vec<u8>) {
        out.resize(out.len() + padding(size), 0);
        self.close(out);
    }

    /// A symbolic link.
    pub fn symlink(&self, name: &[u8], target: &[u8], out: &mut Vec<u8>) {
        self.open(name, out);
        put(out, SYMLINK);
        put(out, &[target]);
        self.close(out);
    }

    fn open(self, name: &[u8], out: &mut Vec<u8>) {
        if self.depth == 0 { put(out, OPEN_ROOT) } else { put(out, &open(name)) }
    }

    fn close(self, out: &mut Vec<u8>) {
        put(out, if self.depth == 0 { CLOSE_ROOT } else { CLOSE });
    }
}

/// Appends strings as a NAR has them: the length, the bytes, and zeros up to a multiple of 8.
pub(super) fn put(out: &mut Vec<u8>, strings: &[&[u8]]) {
    for string in strings {
        out.extend_from_slice(&(string.len() as u64).to_le_bytes());
        out.extend_from_slice(string);
        out.resize(out.len() + padding(string.len() as u64), 0);
    }
}
