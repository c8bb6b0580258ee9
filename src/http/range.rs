//! The Range header, as far as it is served: one range of bytes (RFC 9110, section 14).

use std::ops::Range;

/// What a request asks for of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of it: no range, several, or one that can't be read, which the RFC says to pass over.
    All,
    /// These bytes, within the body.
    Part(Range<u64>),
    /// A range beyond the body's end.
    Unsatisfiable,
}

/// Reads a Range header for a body of `len` bytes.
pub(super) fn parse(header: Option<&str>, len: u64) -> Wanted {
    let parsed = header.and_then(|text| text.trim().strip_prefix("bytes=")).and_then(|range| {
        let (first, last) = range.split_once('-')?;
        Some((number(first)?, number(last)?))
    });
    let range = match parsed {
        None | Some((None, None)) => return Wanted::All,
        Some((Some(first), last)) => {
            if last.is_some_and(|last| last < first) {
                return Wanted::All;
            }
            first..last.map_or(len, |last| last.saturating_add(1).min(len))
        }
        Some((None, Some(suffix))) => len.saturating_sub(suffix)..len,
    };
    if range.start < range.end { Wanted::Part(range) } else { Wanted::Unsatisfiable }
}

/// A number, or nothing; `None` if it is neither.
fn number(text: &str) -> Option<Option<u64>> {
    let text = text.trim();
    if text.is_empty() {
        return Some(None);
    }
    // A sign is no digit; a number beyond u64 lies beyond every body.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| Some(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    #[rstest]
    #[case("bytes=0-0", Wanted::Part(0..1))]
    #[case("bytes=0-", Wanted::Part(0..10))]
    #[case("bytes=5-99", Wanted::Part(5..10))]
    #[case("bytes=-3", Wanted::Part(7..10))]
    #[case("bytes=-99", Wanted::Part(0..10))]
    #[case("bytes=10-", Wanted::Unsatisfiable)]
    #[case("bytes=-0", Wanted::Unsatisfiable)]
    #[case("bytes=99999999999999999999-", Wanted::Unsatisfiable)]
    #[case("bytes=5-4", Wanted::All)]
    #[case("bytes=0-1,3-4", Wanted::All)]
    #[case("bytes=+1-2", Wanted::All)]
    #[case("bytes=-", Wanted::All)]
    #[case("lines=0-1", Wanted::All)]
    fn a_range_of_ten_bytes(#[case] header: &str, #[case] expected: Wanted) {
        assert_eq!(parse(Some(header), 10), expected);
    }

    proptest! {
        #[test]
        fn any_header_stays_within_the_body(header in "(bytes=)?[0-9a-z,+ -]{0,30}", len: u64) {
            if let Wanted::Part(range) = parse(Some(&header), len) {
                prop_assert!(range.start < range.end && range.end <= len);
            }
        }
    }
}
