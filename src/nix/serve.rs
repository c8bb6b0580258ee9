//! The messages of `nix-store --serve`, the protocol behind `ssh://` stores.
//!
//! Integers are u64 little-endian; strings are length, bytes, zero padding to 8. Requests are written whole; answers
//! are read from a buffer that may not hold all of them yet ([`ReadError::Incomplete`]: come back with more bytes).

use std::collections::BTreeSet;

use thiserror::Error;

use super::narinfo::PathInfo;
use super::{CAHash, NarHash, Signature, StoreDir, StorePath};

const CLIENT_MAGIC: u64 = 0x390c_9deb;
const SERVER_MAGIC: u64 = 0x5452_eecb;
/// 2.7, which every Nix since 2.4 and Lix understand.
const CLIENT_VERSION: u64 = 0x207;
/// 2.4 is the first that tells NAR hash, CA and signatures.
const OLDEST_SERVER: u64 = 0x204;
const QUERY_VALID_PATHS: u64 = 1;
const QUERY_PATH_INFOS: u64 = 2;

/// The longest string that is read, in bytes: a store path has at most 4 KiB, a signature a few hundred bytes.
const MAX_STRING: u64 = 64 * 1024;
/// The most elements of a set that are read: more references than any path has.
const MAX_ELEMENTS: u64 = 1024 * 1024;

/// Why an answer can't be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ReadError {
    /// The buffer ends before the answer does: not an error, but a call for more bytes.
    #[error("the answer is not complete yet")]
    Incomplete,
    /// Not `nix-store --serve` on the other side.
    #[error("no nix-store on the other side: it began with {0:#x}")]
    Magic(u64),
    /// A protocol without NAR hashes.
    #[error("nix-store speaks version {0:#x} of the protocol, older than 2.4")]
    Version(u64),
    /// A length beyond its bound.
    #[error("a length of {got} is over the bound of {bound}")]
    TooLong {
        /// What was announced.
        got: u64,
        /// What is allowed.
        bound: u64,
    },
    /// Padding that is not zero: the reading is out of step.
    #[error("padding that is not zero")]
    Padding,
}

/// What is told of one path: its facts, or why they are not understood.
pub type Told = Result<PathInfo, Misunderstood>;

/// A path with facts that are not understood: a name or hash of a kind that is not known here.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("what nix-store says of {path} is not understood: {why}")]
pub struct Misunderstood {
    /// The path.
    pub path: String,
    /// What is wrong with it.
    pub why: String,
}

/// The greeting that opens the conversation.
#[must_use]
pub fn hello() -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    put_u64(&mut out, CLIENT_MAGIC);
    put_u64(&mut out, CLIENT_VERSION);
    out
}

/// Asks which of the paths are valid, and locks each (valid or not) with a temporary garbage-collector root that lives
/// as long as the process on the other side. Nothing is substituted.
pub fn query_valid_paths<'a>(
    out: &mut Vec<u8>,
    paths: impl ExactSizeIterator<Item = &'a StorePath>,
    store_dir: &StoreDir,
) {
    put_u64(out, QUERY_VALID_PATHS);
    put_u64(out, 1);
    put_u64(out, 0);
    put_paths(out, paths, store_dir);
}

/// Asks for what is known of the paths. Those that are not valid are left out of the answer.
pub fn query_path_infos<'a>(
    out: &mut Vec<u8>,
    paths: impl ExactSizeIterator<Item = &'a StorePath>,
    store_dir: &StoreDir,
) {
    put_u64(out, QUERY_PATH_INFOS);
    put_paths(out, paths, store_dir);
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_paths<'a>(
    out: &mut Vec<u8>,
    paths: impl ExactSizeIterator<Item = &'a StorePath>,
    store_dir: &StoreDir,
) {
    put_u64(out, paths.len() as u64);
    for path in paths {
        let text = store_dir.render_path(path);
        put_u64(out, text.len() as u64);
        out.extend_from_slice(text.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// Reads one answer after the other from bytes that have arrived so far.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    store_dir: &'a StoreDir,
}

impl<'a> Reader<'a> {
    /// Begins at the first byte of an answer.
    #[must_use]
    pub fn new(bytes: &'a [u8], store_dir: &'a StoreDir) -> Self {
        Self { bytes, at: 0, store_dir }
    }

    /// How many bytes the answers read so far had.
    #[must_use]
    pub fn consumed(&self) -> usize {
        self.at
    }

    /// The answer to [`hello`]: the version of the other side.
    pub fn hello(&mut self) -> Result<u64, ReadError> {
        match self.u64()? {
            SERVER_MAGIC => {}
            other => return Err(ReadError::Magic(other)),
        }
        let version = self.u64()?;
        if version < OLDEST_SERVER { Err(ReadError::Version(version)) } else { Ok(version) }
    }

    /// The answer to [`query_valid_paths`]. Paths whose names are not understood are left out.
    pub fn valid_paths(&mut self) -> Result<BTreeSet<StorePath>, ReadError> {
        let paths = self.strings()?;
        Ok(paths.into_iter().filter_map(|path| self.to_path(path).ok()).collect())
    }

    /// One element of the answer to [`query_path_infos`]; `None` is its end. All of it is read before any of it is
    /// understood: a value that is not understood concerns one path, a length that is not ends the conversation.
    pub fn path_info(&mut self) -> Result<Option<Told>, ReadError> {
        let path = self.string()?;
        if path.is_empty() {
            return Ok(None);
        }
        let deriver = self.string()?;
        let references = self.strings()?;
        let _download_size = self.u64()?;
        let nar_size = self.u64()?;
        let nar_hash = self.string()?;
        let ca = self.string()?;
        let signatures = self.strings()?;
        let understand = || {
            let nar_hash = std::str::from_utf8(nar_hash).map_err(|error| error.to_string())?;
            Ok(PathInfo {
                store_path: self.to_path(path)?,
                nar_hash: NarHash::parse(nar_hash).map_err(|error| error.to_string())?,
                nar_size,
                references: references.iter().map(|path| self.to_path(path)).collect::<Result<_, _>>()?,
                deriver: if deriver.is_empty() { None } else { Some(self.to_path(deriver)?) },
                // Nix stores whatever it was given; what is not `name:base64` can't vouch for anything.
                signatures: signatures.iter().filter_map(|text| signature(text)).collect(),
                // A content address of a kind that we do not know proves nothing to us: as if there were none.
                ca: std::str::from_utf8(ca).ok().and_then(|ca| CAHash::parse(ca).ok()),
            })
        };
        Ok(Some(understand().map_err(|why: String| {
            let path = String::from_utf8_lossy(path).into_owned();
            Misunderstood { path, why }
        })))
    }

    fn u64(&mut self) -> Result<u64, ReadError> {
        let bytes = self.bytes.get(self.at..self.at + 8).ok_or(ReadError::Incomplete)?;
        self.at += 8;
        let mut value = [0; 8];
        value.copy_from_slice(bytes);
        Ok(u64::from_le_bytes(value))
    }

    fn length(&mut self, bound: u64) -> Result<usize, ReadError> {
        let got = self.u64()?;
        if got > bound {
            return Err(ReadError::TooLong { got, bound });
        }
        usize::try_from(got).map_err(|_| ReadError::TooLong { got, bound })
    }

    fn string(&mut self) -> Result<&'a [u8], ReadError> {
        let length = self.length(MAX_STRING)?;
        let padded = length.next_multiple_of(8);
        let bytes = self.bytes.get(self.at..self.at + padded).ok_or(ReadError::Incomplete)?;
        self.at += padded;
        let (string, padding) = bytes.split_at(length);
        if padding.iter().any(|&byte| byte != 0) {
            return Err(ReadError::Padding);
        }
        Ok(string)
    }

    fn strings(&mut self) -> Result<Vec<&'a [u8]>, ReadError> {
        let count = self.length(MAX_ELEMENTS)?;
        (0..count).map(|_| self.string()).collect()
    }

    fn to_path(&self, path: &[u8]) -> Result<StorePath, String> {
        let told = |error| format!("{:?}: {error}", String::from_utf8_lossy(path));
        self.store_dir.parse_path(path).map_err(told)
    }
}

fn signature(text: &[u8]) -> Option<Signature> {
    Signature::parse(std::str::from_utf8(text).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::narinfo::tests::{any_path_info, any_store_path};
    use proptest::prelude::*;

    fn put(out: &mut Vec<u8>, text: &str) {
        put_u64(out, text.len() as u64);
        out.extend_from_slice(text.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }

    /// What `nix-store --serve` writes for one path, from serve_protocol in Nix 2.8.
    fn encode(info: &PathInfo, dir: &StoreDir) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, &dir.render_path(&info.store_path));
        put(&mut out, &info.deriver.as_ref().map_or(String::new(), |path| dir.render_path(path)));
        put_paths(&mut out, info.references.iter(), dir);
        put_u64(&mut out, info.nar_size);
        put_u64(&mut out, info.nar_size);
        put(&mut out, &info.nar_hash.to_string());
        put(&mut out, &info.ca.as_ref().map_or(String::new(), CAHash::to_nix_string));
        put_u64(&mut out, info.signatures.len() as u64);
        for signature in &info.signatures {
            put(&mut out, &signature.to_string());
        }
        out
    }

    #[test]
    fn a_stranger_is_recognised() {
        let dir = StoreDir::default();
        let mut reader = Reader::new(b"Permission denied, please try again", &dir);
        assert!(matches!(reader.hello(), Err(ReadError::Magic(_))));
    }

    #[test]
    fn a_value_that_is_not_understood_concerns_its_path_alone() {
        let dir = StoreDir::default();
        let mut bytes = Vec::new();
        // Nix 2.8 allows a name that begins with dots; nix-derivation does not.
        let odd = format!("/nix/store/{}-..-x", "0".repeat(32));
        for text in [&*format!("/nix/store/{}-good", "1".repeat(32)), ""] {
            put(&mut bytes, text);
        }
        put_u64(&mut bytes, 1);
        put(&mut bytes, &odd);
        for _ in 0..2 {
            put_u64(&mut bytes, 120);
        }
        put(&mut bytes, "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73");
        put(&mut bytes, "");
        put_u64(&mut bytes, 0);
        put(&mut bytes, "");
        let mut reader = Reader::new(&bytes, &dir);
        let told = reader.path_info().unwrap().unwrap().unwrap_err();
        assert!(told.to_string().contains("..-x"), "{told}");
        assert_eq!(reader.path_info().unwrap(), None);
    }

    proptest! {
        #[test]
        fn path_infos_are_read_wherever_the_bytes_are_cut(
            infos in prop::collection::vec(any_path_info(), 0..3), cut: prop::sample::Index,
        ) {
            let dir = StoreDir::default();
            let mut bytes: Vec<u8> = infos.iter().flat_map(|info| encode(info, &dir)).collect();
            put(&mut bytes, "");
            let mut reader = Reader::new(&bytes, &dir);
            for info in &infos {
                prop_assert_eq!(reader.path_info().unwrap(), Some(Ok(info.clone())));
            }
            prop_assert_eq!(reader.path_info().unwrap(), None);
            prop_assert_eq!(reader.consumed(), bytes.len());

            let mut short = Reader::new(&bytes[..cut.index(bytes.len())], &dir);
            let end = loop {
                match short.path_info() {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            };
            prop_assert_eq!(end, Err(ReadError::Incomplete));
        }

        #[test]
        fn valid_paths_are_read(paths in prop::collection::btree_set(any_store_path(), 0..5)) {
            let dir = StoreDir::default();
            let mut bytes = Vec::new();
            put_paths(&mut bytes, paths.iter(), &dir);
            prop_assert_eq!(Reader::new(&bytes, &dir).valid_paths().unwrap(), paths);
        }

        #[test]
        fn any_bytes_are_an_answer_or_an_error(bytes: Vec<u8>) {
            let dir = StoreDir::default();
            let _ = Reader::new(&bytes, &dir).hello();
            let _ = Reader::new(&bytes, &dir).valid_paths();
            let _ = Reader::new(&bytes, &dir).path_info();
        }

        #[test]
        fn a_damaged_answer_is_an_answer_or_an_error(info in any_path_info(), at: prop::sample::Index, byte: u8) {
            let dir = StoreDir::default();
            let mut bytes = encode(&info, &dir);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = Reader::new(&bytes, &dir).path_info();
        }
    }
}
