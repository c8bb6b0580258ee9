//! Why a tree can't be laid out.

use std::path::{Path, PathBuf};

use rustix::io::Errno;
use thiserror::Error;

use crate::nix::layout::LayoutError;

/// Why a tree can't be laid out.
#[derive(Debug, Error)]
pub enum TreeError {
    /// The system refuses; a path that is being deleted shows as missing here.
    #[error("{path}: {source}")]
    Io {
        /// What was read.
        path: PathBuf,
        /// What the system says.
        source: Errno,
    },
    /// A device, socket or pipe.
    #[error("{0}: a NAR holds files, directories and symbolic links only")]
    Kind(PathBuf),
    /// A directory where there was none a moment ago.
    #[error("{0}: it changed while the tree was read")]
    Changed(PathBuf),
    /// Who asked is gone.
    #[error("{0}: nobody waits for it any more")]
    Unwanted(PathBuf),
    /// The layout refuses it.
    #[error("{path}: {source}")]
    Layout {
        /// Where.
        path: PathBuf,
        /// Why.
        source: LayoutError,
    },
}

impl TreeError {
    /// For what the system says of `path`.
    pub(super) fn io(path: &Path) -> impl Fn(Errno) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}
