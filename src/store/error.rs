//! Why the store can't answer, or can't be opened.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::build_log::LogError;
use super::child::ChildError;
use super::tree_error::TreeError;

/// Why the store can't answer.
#[derive(Debug, Error)]
pub enum StoreError {
    /// `nix-store` can't be asked.
    #[error("the local store can't be asked: {0}")]
    Unavailable(Arc<ChildError>),
    /// Too many questions wait.
    #[error("the local store did not answer within {0:?}")]
    Busy(Duration),
    /// The daemon shuts down.
    #[error("the local store is closed")]
    Closed,
    /// The path is there, but not as the store's database says: half deleted, or damaged.
    #[error(
        "{path} has a NAR of {found} bytes where the store says {expected}: it is being deleted, or damaged"
    )]
    WrongSize {
        /// Where it lies.
        path: PathBuf,
        /// NarSize in the database.
        expected: u64,
        /// What the tree on disk comes to.
        found: u64,
    },
    /// The tree can't be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The build log can't be read.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// The store directory can't be read, so that nothing could ever be served from it.
#[derive(Debug, Error)]
pub enum OpenError {
    /// `store.root` is not there.
    #[error("the store {} does not exist: make it, or correct store.root", .0.display())]
    Missing(PathBuf),
    /// It, or the folder of store paths, is there and keeps us out.
    #[error(
        "the store {directory} can't be read: {source}; run peernix as a user who may, or see store.root"
    )]
    Unreadable {
        /// Which.
        directory: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}
