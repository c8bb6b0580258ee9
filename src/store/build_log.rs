//! Build logs, as Nix keeps them below its log directory: plain or packed with bzip2. Blocking.

use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use thiserror::Error;

use crate::nix::StorePath;

const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();

/// Why a log that is there can't be given out.
#[derive(Debug, Error)]
pub enum LogError {
    /// It can't be read, or unpacked.
    #[error("the build log {path}: {source}")]
    Io {
        /// Which.
        path: String,
        /// What the system, or the packing, says.
        source: std::io::Error,
    },
    /// Longer than `store.log_size`.
    #[error("the build log {path} has more than {limit_bytes} bytes (store.log_size)")]
    TooLong {
        /// Which.
        path: String,
        /// What is allowed.
        limit_bytes: u64,
    },
}

/// Reads the log of a derivation, unpacked. `None`: there is none.
pub(super) fn read(
    directory: &Path,
    derivation: &StorePath,
    limit_bytes: u64,
) -> Result<Option<Vec<u8>>, LogError> {
    // Nix splits the name after its second character.
    let name = derivation.to_basename();
    let (folder, rest) = name.split_at(2);
    for (suffix, packed) in [("", false), (".bz2", true)] {
        let path = directory.join(folder).join(format!("{rest}{suffix}"));
        let shown = path.display().to_string();
        // A pipe or a device in the place of a log would block for ever.
        let mut options = std::fs::OpenOptions::new();
        let file = match options.read(true).custom_flags(NONBLOCK).open(&path) {
            Ok(file) if file.metadata().is_ok_and(|meta| meta.is_file()) => file,
            Ok(_) => continue,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(source) => return Err(LogError::Io { path: shown, source }),
        };
        let mut text = Vec::new();
        let unpacked: Box<dyn Read> =
            if packed { Box::new(bzip2::read::MultiBzDecoder::new(file)) } else { Box::new(file) };
        // One more than allowed tells a log that is too long from one that just fits.
        let read = unpacked.take(limit_bytes + 1).read_to_end(&mut text);
        read.map_err(|source| LogError::Io { path: shown.clone(), source })?;
        if text.len() as u64 > limit_bytes {
            return Err(LogError::TooLong { path: shown, limit_bytes });
        }
        return Ok(Some(text));
    }
    Ok(None)
}
