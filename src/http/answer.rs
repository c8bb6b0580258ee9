//! From outcomes to answers: the one place where errors become statuses.
//!
//! On loopback a 5xx fails the build that asked, and a 404 sends Nix on to its next substituter: so whatever fails on
//! our side is a 404. 429 and 403 are for others than the local Nix.

use axum::body::Body;
use bytes::Bytes;
use hyper::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};

use crate::resolve::ResolveError;

/// Why a request gets no content.
#[derive(Debug)]
pub(super) enum Refused {
    /// Not a URL of ours.
    Malformed,
    /// Nobody has it.
    NotFound,
    /// It could not be found out.
    Failed(ResolveError),
    /// Too much is under way already.
    Busy,
    /// `http.allow` does not have the address.
    NotAllowed,
    /// More requests than `limits.requests_per_second`; the next one is welcome in so many seconds.
    TooMany(u64),
    /// Neither GET nor HEAD.
    Method,
    /// A range beyond the NAR's end, which has so many bytes.
    Range(u64),
}

impl From<ResolveError> for Refused {
    fn from(error: ResolveError) -> Self {
        Self::Failed(error)
    }
}

impl Refused {
    pub(super) fn into_answer(self) -> Response<Body> {
        let (status, text) = match &self {
            Self::Malformed => (StatusCode::NOT_FOUND, "no such file in a binary cache\n"),
            Self::NotFound => (StatusCode::NOT_FOUND, "not here\n"),
            Self::Failed(_) | Self::Busy => (StatusCode::NOT_FOUND, "not to be had right now\n"),
            Self::NotAllowed => (StatusCode::FORBIDDEN, "http.allow does not have your address\n"),
            Self::TooMany(_) => (StatusCode::TOO_MANY_REQUESTS, "too many requests\n"),
            Self::Method => (StatusCode::METHOD_NOT_ALLOWED, "this cache can only be read\n"),
            Self::Range(_) => (StatusCode::RANGE_NOT_SATISFIABLE, "beyond the end\n"),
        };
        let mut answer = text_answer(status, "text/plain; charset=utf-8", text.into());
        let headers = answer.headers_mut();
        match self {
            Self::TooMany(seconds) => {
                headers.insert(RETRY_AFTER, seconds.into());
            }
            Self::Method => {
                headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            }
            Self::Range(len) => {
                if let Ok(value) = format!("bytes */{len}").try_into() {
                    headers.insert(hyper::header::CONTENT_RANGE, value);
                }
            }
            // Strangers are few at a time; whoever is told no has no reason to stay.
            Self::NotAllowed => {
                headers.insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Self::Malformed | Self::NotFound | Self::Failed(_) | Self::Busy => {}
        }
        answer
    }
}

/// An answer whose body is at hand.
pub(super) fn text_answer(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Body> {
    let mut answer = Response::new(Body::from(body));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// 200 with a body that is at hand.
pub(super) fn found(kind: &'static str, body: Bytes) -> Response<Body> {
    text_answer(StatusCode::OK, kind, body)
}
