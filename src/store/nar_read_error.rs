//! Why a NAR can't be read.

use std::path::PathBuf;

use rustix::io::Errno;
use thiserror::Error;

/// Why a NAR can't be read to its end.
#[derive(Debug, Error)]
pub enum NarReadError {
    /// The system refuses; a path that is being deleted shows as missing here.
    #[error("{path}: {source}")]
    Io {
        /// What was read.
        path: PathBuf,
        /// What the system says.
        source: Errno,
    },
    /// Not the file any more that was laid out.
    #[error("{0}: the file changed while its path was served")]
    Changed(PathBuf),
    /// The layout came to its end before the range did.
    #[error("{0}: the NAR is shorter than it was laid out")]
    Short(PathBuf),
    /// The copy of the NAR can't be written. The NAR itself may be had.
    #[error("{0}")]
    Copy(std::io::Error),
    /// The runtime shuts down.
    #[error("reading was stopped")]
    Stopped,
}
