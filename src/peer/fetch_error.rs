//! Why a peer gave no answer, and whose fault that is.

use std::time::Duration;

use thiserror::Error;

/// Why a peer gave no answer.
#[derive(Debug, Error)]
pub enum FetchError {
    /// No connection, or a connection that broke.
    #[error("no connection: {0}")]
    Network(String),
    /// Nothing within the deadline.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// Another status than 200 and "not here".
    #[error("it answered with status {0}")]
    Status(u16),
    /// More than any narinfo has, or than was announced.
    #[error("it sent more than {0} bytes")]
    TooLarge(u64),
    /// A body that is not packed as it says, or as it may be.
    #[error("{0}")]
    Encoding(&'static str),
    /// The host was started again since it said who it is, or another has its address now.
    #[error("another instance of peernix answers there")]
    Replaced,
    /// The request could not be made at all.
    #[error("the request can't be made: {0}")]
    Request(String),
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The peer answers wrongly.
    Peer,
    /// The way to it, or its being away.
    Network,
    /// Ourselves: no reason to think worse of the peer.
    Us,
}

impl FetchError {
    /// Whose fault it is.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            Self::Network(_) | Self::Timeout(_) => Blame::Network,
            Self::Status(_) | Self::TooLarge(_) | Self::Encoding(_) | Self::Replaced => Blame::Peer,
            Self::Request(_) => Blame::Us,
        }
    }
}

/// What a failure of the HTTP client means here.
pub(super) fn to_error(error: reqwest::Error) -> FetchError {
    if error.is_builder() {
        return FetchError::Request(error.to_string());
    }
    // The outermost error only says that something failed; the innermost says what.
    let mut source: &dyn std::error::Error = &error;
    while let Some(inner) = source.source() {
        source = inner;
    }
    match source.downcast_ref::<std::io::Error>() {
        Some(error) => io_error(error),
        None => FetchError::Network(source.to_string()),
    }
}

/// That we have no descriptors left is not the peer's fault.
pub(super) fn io_error(error: &std::io::Error) -> FetchError {
    match rustix::io::Errno::from_io_error(error) {
        Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => FetchError::Request(error.to_string()),
        _ => FetchError::Network(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_there_are_no_descriptors_left_is_not_the_fault_of_a_peer() {
        let blame = |code: i32| io_error(&std::io::Error::from_raw_os_error(code)).blame();
        assert_eq!(blame(rustix::io::Errno::MFILE.raw_os_error()), Blame::Us);
        assert_eq!(blame(rustix::io::Errno::NFILE.raw_os_error()), Blame::Us);
        assert_eq!(blame(rustix::io::Errno::CONNREFUSED.raw_os_error()), Blame::Network);
    }
}
