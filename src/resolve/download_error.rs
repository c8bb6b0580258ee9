//! Why a NAR did not come from a peer.

use thiserror::Error;

use crate::cache::Deserted;
use crate::peer::FetchError;

/// Why a NAR did not come from a peer.
#[derive(Debug, Error)]
pub(super) enum DownloadError {
    /// A peer could not be asked, or broke off.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It had the narinfo, and not the NAR.
    #[error("the peer has the narinfo and not the NAR")]
    NotThere,
    /// A content address proves no NarSize: who tells another one may well be right, and has nothing to do with this download.
    #[error("the peer tells another NarSize")]
    OtherSize,
    /// More or fewer bytes than NarSize.
    #[error("the peer sent {got} bytes of a NAR of {expected}")]
    Length {
        /// How many came.
        got: u64,
        /// NarSize.
        expected: u64,
    },
    /// Other bytes than those that were signed.
    #[error("the peer sent other bytes than those of NarHash")]
    Hash,
    /// Another peer sends other bytes than those that were given out already: too late to mend.
    #[error("a peer sent other bytes than those of NarHash, and its first ones were given out")]
    GivenOut,
    /// Nobody listens any more.
    #[error(transparent)]
    Deserted(#[from] Deserted),
    /// The daemon shuts down.
    #[error("the daemon stops")]
    Stopped,
}
