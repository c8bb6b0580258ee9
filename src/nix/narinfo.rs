//! narinfo: the signed facts about a store path, and the unsigned ones about the file that carries its NAR.
//!
//! A [`NarInfo`] is a claim. Parsing and printing are nix-narinfo's; what it does not check is checked here (a NarHash
//! that is not SHA-256 is refused, since nothing could verify it later).

use std::collections::BTreeSet;

use nix_narinfo::Compression;
use thiserror::Error;

use super::{CAHash, NarHash, PublicKey, Signature, StoreDir, StorePath, StorePathHash, cache_url};

/// The facts about a store path that signatures vouch for, with the signatures themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathInfo {
    /// The store path.
    pub store_path: StorePath,
    /// SHA-256 of its NAR.
    pub nar_hash: NarHash,
    /// Length of its NAR in bytes, at least 1.
    pub nar_size: u64,
    /// What its contents refer to, itself included where they do.
    pub references: BTreeSet<StorePath>,
    /// The derivation that it was built from, where that is known. Not signed.
    pub deriver: Option<StorePath>,
    /// In the order in which they were stored.
    pub signatures: Vec<Signature>,
    /// Content address: proves the path without a signature.
    pub ca: Option<CAHash>,
}

/// What the content address of a path proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentAddressProof {
    /// There is none.
    Absent,
    /// It leads to another path: somebody lies.
    OtherPath,
    /// The store path and its references. NarHash and NarSize are not proven by it.
    Path,
}

/// The facts about the file that carries the NAR; nobody signs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NarFile {
    /// Where the file lies, relative to the cache.
    pub url: String,
    /// How the NAR is compressed in it.
    pub compression: Compression,
    /// SHA-256 of the file.
    pub hash: Option<NarHash>,
    /// Length of the file in bytes.
    pub size: Option<u64>,
}

/// A narinfo as somebody claims it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NarInfo {
    /// What is signed.
    pub info: PathInfo,
    /// What is not.
    pub file: NarFile,
    /// Keys that we do not know, kept for whoever does.
    pub extensions: Vec<nix_narinfo::Field>,
}

/// Why a narinfo can't be read or written.
#[derive(Debug, Error)]
pub enum NarInfoError {
    /// The text is not a narinfo.
    #[error(transparent)]
    Parse(#[from] nix_narinfo::ParseError),
    /// The facts can't be put into a narinfo.
    #[error(transparent)]
    Build(#[from] nix_narinfo::BuildError),
    /// NarHash is of another algorithm.
    #[error("NarHash: {0}")]
    NarHash(super::hash::HashError),
}

impl PathInfo {
    /// The text that a signature of this path signs.
    pub fn fingerprint(&self, store_dir: &StoreDir) -> Result<String, NarInfoError> {
        let file = NarFile::plain(self);
        Ok(record(self, &file, &[], store_dir)?.fingerprint(store_dir))
    }

    /// Whether one of its signatures is good and by one of these keys.
    pub fn is_signed_by(&self, keys: &[PublicKey], store_dir: &StoreDir) -> Result<bool, NarInfoError> {
        let file = NarFile::plain(self);
        Ok(record(self, &file, &[], store_dir)?.has_valid_signature(store_dir, keys))
    }

    /// What the content address proves.
    #[must_use]
    pub fn content_address_proof(&self, store_dir: &StoreDir) -> ContentAddressProof {
        if self.ca.is_none() {
            return ContentAddressProof::Absent;
        }
        let file = NarFile::plain(self);
        let leads_here = |record: nix_narinfo::NarInfo| record.is_content_addressed(store_dir);
        if !record(self, &file, &[], store_dir).is_ok_and(leads_here) {
            return ContentAddressProof::OtherPath;
        }
        ContentAddressProof::Path
    }

    /// The hash part of the store path.
    #[must_use]
    pub fn hash(&self) -> StorePathHash {
        StorePathHash::of(&self.store_path)
    }

    /// About how many bytes it holds in memory.
    #[must_use]
    pub fn weight(&self) -> usize {
        let path = |path: &StorePath| path.name().len() + size_of::<StorePath>();
        size_of::<Self>()
            + self.references.iter().map(path).sum::<usize>()
            + self.deriver.as_ref().map_or(0, path)
            + self.signatures.iter().map(|s| s.key_name.len() + s.encoded.len() + 48).sum::<usize>()
    }
}

impl NarFile {
    /// The file that is the NAR itself, below our own URL.
    #[must_use]
    pub fn plain(info: &PathInfo) -> Self {
        Self {
            url: cache_url::nar_path(&info.hash(), &info.nar_hash),
            compression: Compression::None,
            hash: Some(info.nar_hash),
            size: Some(info.nar_size),
        }
    }
}

impl NarInfo {
    /// Reads a narinfo of at most 1 MiB.
    pub fn parse(text: &[u8], store_dir: &StoreDir) -> Result<Self, NarInfoError> {
        let record = nix_narinfo::NarInfo::parse_in(store_dir, text)?;
        let sha256 = |hash: &nix_derivation::NixHash| NarHash::parse(&hash.to_nix_nixbase32_string());
        Ok(Self {
            info: PathInfo {
                store_path: record.store_path().clone(),
                nar_hash: sha256(record.nar_hash()).map_err(NarInfoError::NarHash)?,
                nar_size: record.nar_size(),
                references: record.references().clone(),
                deriver: record.deriver().cloned(),
                signatures: record.signatures().to_vec(),
                ca: record.content_address().cloned(),
            },
            file: NarFile {
                url: record.url().to_owned(),
                compression: record.compression().clone(),
                // FileHash is a hint that nobody signs: one of another algorithm is dropped.
                hash: record.file_hash().and_then(|hash| sha256(hash).ok()),
                size: record.file_size(),
            },
            extensions: record.extensions().to_vec(),
        })
    }

    /// Writes it in Nix's order of fields.
    pub fn to_text(&self, store_dir: &StoreDir) -> Result<Vec<u8>, NarInfoError> {
        let record = record(&self.info, &self.file, &self.extensions, store_dir)?;
        Ok(record.to_canonical_bytes())
    }
}

/// How the file is described that a narinfo of ours names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileForm {
    /// The NAR itself, with its hash and length.
    Plain,
    /// The NAR as zstd: made when it is asked for, so that nobody knows its hash and length.
    Zstd,
}

impl FileForm {
    /// A narinfo that we wrote of the plain file, as one of this form. What is signed stays as it is.
    #[must_use]
    pub fn of(self, plain: &[u8]) -> Vec<u8> {
        if self == Self::Plain {
            return plain.to_vec();
        }
        let mut text = Vec::with_capacity(plain.len());
        for line in plain.split_inclusive(|byte| *byte == b'\n') {
            if line.starts_with(b"URL: ") {
                text.extend_from_slice(line.trim_ascii_end());
                text.extend_from_slice(b".zst\n");
            } else if line.starts_with(b"Compression: ") {
                text.extend_from_slice(b"Compression: zstd\n");
            } else if !line.starts_with(b"FileHash: ") && !line.starts_with(b"FileSize: ") {
                text.extend_from_slice(line);
            }
        }
        text
    }
}

fn record(
    info: &PathInfo,
    file: &NarFile,
    extensions: &[nix_narinfo::Field],
    store_dir: &StoreDir,
) -> Result<nix_narinfo::NarInfo, NarInfoError> {
    let (path, hash) = (info.store_path.clone(), info.nar_hash.to_nix());
    let dir = store_dir.clone();
    Ok(nix_narinfo::NarInfo::builder_in(dir, path, file.url.clone(), hash, info.nar_size)
        .compression(file.compression.clone())
        .references(info.references.iter().cloned())
        .deriver(info.deriver.clone())
        .signatures(info.signatures.iter().cloned())
        .content_address(info.ca.clone())
        .file_hash(file.hash.map(NarHash::to_nix))
        .file_size(file.size)
        .extensions(extensions.iter().cloned())
        .build()?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::nix::secret_key::SecretKey;
    use proptest::prelude::*;

    pub(crate) fn any_store_path() -> impl Strategy<Value = StorePath> {
        ("[0-9a-df-np-sv-z]{32}", "[a-zA-Z0-9+_?=-][a-zA-Z0-9+._?=-]{0,40}")
            .prop_map(|(hash, name)| StorePath::from_basename(format!("{hash}-{name}").as_bytes()).unwrap())
    }

    prop_compose! {
        pub(crate) fn any_path_info()(
            store_path in any_store_path(),
            digest: [u8; 32],
            nar_size in 1u64..,
            references in prop::collection::btree_set(any_store_path(), 0..4),
            deriver in prop::option::of(any_store_path()),
            seeds in prop::collection::vec(any::<[u8; 32]>(), 0..3),
            ca in prop::option::of(any::<[u8; 32]>()),
        ) -> PathInfo {
            let mut info = PathInfo {
                store_path,
                nar_hash: NarHash::from_digest(digest),
                nar_size,
                references,
                deriver,
                signatures: Vec::new(),
                ca: ca.map(|digest| {
                    let hash = NarHash::from_digest(digest);
                    CAHash::parse(&format!("fixed:r:{hash}")).unwrap()
                }),
            };
            let fingerprint = info.fingerprint(&StoreDir::default()).unwrap();
            for seed in seeds {
                info.signatures.push(SecretKey::from_seed("key-1", seed).unwrap().sign(&fingerprint));
            }
            info
        }
    }

    proptest! {
        #[test]
        fn a_packed_file_changes_nothing_that_is_signed(info in any_path_info()) {
            let (dir, file) = (StoreDir::default(), NarFile::plain(&info));
            let plain = NarInfo { info, file, extensions: Vec::new() };
            let text = plain.to_text(&dir).unwrap();
            prop_assert_eq!(FileForm::Plain.of(&text), text.clone());
            let packed = NarInfo::parse(&FileForm::Zstd.of(&text), &dir).unwrap();
            prop_assert_eq!(&packed.info, &plain.info);
            let url = format!("{}.zst", plain.file.url);
            prop_assert_eq!(packed.file, NarFile { url, compression: Compression::Zstd, hash: None, size: None });
        }

        #[test]
        fn any_narinfo_survives_its_text(info in any_path_info()) {
            let store_dir = StoreDir::default();
            let file = NarFile::plain(&info);
            let narinfo = NarInfo { info, file, extensions: Vec::new() };
            let text = narinfo.to_text(&store_dir).unwrap();
            prop_assert_eq!(NarInfo::parse(&text, &store_dir).unwrap(), narinfo);
        }

        #[test]
        fn a_change_of_any_signed_field_breaks_the_signature(
            mut info in any_path_info(), seed: [u8; 32], other in any_path_info(), field in 0..4,
        ) {
            let store_dir = StoreDir::default();
            let key = SecretKey::from_seed("key-2", seed).unwrap();
            info.signatures = vec![key.sign(&info.fingerprint(&store_dir).unwrap())];
            let keys = [key.public_key()];
            prop_assert!(info.is_signed_by(&keys, &store_dir).unwrap());
            let before = info.clone();
            match field {
                0 => info.store_path = other.store_path,
                1 => info.nar_hash = other.nar_hash,
                2 => info.nar_size = other.nar_size,
                _ => info.references = other.references,
            }
            prop_assume!(before != info);
            prop_assert!(!info.is_signed_by(&keys, &store_dir).unwrap());
        }

        #[test]
        fn any_bytes_are_a_narinfo_or_an_error(bytes: Vec<u8>, text in "([A-Z][a-zA-Z]{1,9}: ?.{0,40}\n){0,9}") {
            let _ = NarInfo::parse(&bytes, &StoreDir::default());
            let _ = NarInfo::parse(text.as_bytes(), &StoreDir::default());
        }

        #[test]
        fn a_damaged_narinfo_is_a_narinfo_or_an_error(info in any_path_info(), at: prop::sample::Index, byte: u8) {
            let store_dir = StoreDir::default();
            let file = NarFile::plain(&info);
            let mut text = NarInfo { info, file, extensions: Vec::new() }.to_text(&store_dir).unwrap();
            let at = at.index(text.len());
            text[at] = byte;
            if let Ok(narinfo) = NarInfo::parse(&text, &store_dir) {
                let _ = narinfo.to_text(&store_dir);
                let _ = narinfo.info.fingerprint(&store_dir);
            }
        }
    }
}
