//! The paths of a binary cache's URLs: parsed to values or refused, never trusted.
//!
//! Pure, and before any I/O: whatever is not exactly one of the forms below is nobody's file. A URL that a peer's
//! narinfo gives is never followed; ours are rebuilt from the hashes that were parsed.

use percent_encoding::percent_decode_str;

use super::{NarHash, StorePath, StorePathHash};

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheUrl {
    /// `nix-cache-info`
    CacheInfo,
    /// `<hash>.narinfo`
    NarInfo(StorePathHash),
    /// `nar/<hash>-<narhash>.nar` and the older forms.
    Nar(NarUrl),
    /// `nar/<hash>-<narhash>.nar.zst`
    PackedNar(NarUrl),
    /// `<hash>.ls`
    Listing(StorePathHash),
    /// `log/<derivation>`
    Log(StorePath),
}

/// Which NAR a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NarUrl {
    /// The hash part of the store path.
    pub hash: StorePathHash,
    /// The NarHash; only `<hash>.nar`, which peernix in Go asks for, does without.
    pub nar_hash: Option<NarHash>,
}

/// The path of a NAR below the cache, as our narinfos name it: enough by itself, days later.
#[must_use]
pub fn nar_path(hash: &StorePathHash, nar_hash: &NarHash) -> String {
    format!("nar/{hash}-{}.nar", nar_hash.to_base32())
}

/// The path of a NAR below a peer's cache, rebuilt from the URL that the peer's narinfo gives. `None`: that URL is none of
/// the forms that are known, or of another NAR. Nothing of the given text is kept.
#[must_use]
pub fn rebuilt_nar_path(given: &str, hash: &StorePathHash, nar_hash: &NarHash) -> Option<String> {
    let (path, query) = given.split_once('?').map_or((given, None), |(path, query)| (path, Some(query)));
    let CacheUrl::Nar(url) = CacheUrl::parse(&format!("/{path}"), query)? else { return None };
    if url.hash != *hash || url.nar_hash.is_some_and(|given| given != *nar_hash) {
        return None;
    }
    Some(match (path.starts_with("nar/"), query, url.nar_hash) {
        (true, Some(_), _) if !path.contains('-') => format!("nar/{}.nar?hash={hash}", nar_hash.to_base32()),
        (true, ..) => nar_path(hash, nar_hash),
        (false, _, Some(_)) => format!("{hash}-{}.nar", nar_hash.to_base32()),
        (false, _, None) => format!("{hash}.nar"),
    })
}

impl CacheUrl {
    /// Reads the path of a URL, with or without `/nix-cache/` in front. `None`: not a file of a binary cache.
    #[must_use]
    pub fn parse(path: &str, query: Option<&str>) -> Option<Self> {
        let path = percent_decode_str(path.strip_prefix('/')?).decode_utf8().ok()?;
        let path = path.strip_prefix("nix-cache/").unwrap_or(&path);
        if path == "nix-cache-info" {
            return Some(Self::CacheInfo);
        }
        if let Some(derivation) = path.strip_prefix("log/") {
            let path = StorePath::from_basename(derivation.as_bytes()).ok()?;
            return path.is_derivation().then_some(Self::Log(path));
        }
        if let Some(stem) = path.strip_suffix(".narinfo") {
            return hash(stem).map(Self::NarInfo);
        }
        if let Some(stem) = path.strip_suffix(".ls") {
            return hash(stem).map(Self::Listing);
        }
        if let Some(stem) = path.strip_suffix(".nar.zst") {
            return both_hashes(stem.strip_prefix("nar/")?).map(Self::PackedNar);
        }
        let stem = path.strip_suffix(".nar")?;
        match stem.strip_prefix("nar/") {
            Some(stem) => both_hashes(stem).or_else(|| harmonia_form(stem, query?)),
            None => both_hashes(stem).or_else(|| Some(NarUrl { hash: hash(stem)?, nar_hash: None })),
        }
        .map(Self::Nar)
    }
}

fn hash(text: &str) -> Option<StorePathHash> {
    StorePathHash::parse(text.as_bytes()).ok()
}

/// `<hash>-<narhash>`
fn both_hashes(stem: &str) -> Option<NarUrl> {
    let (part, nar_hash) = stem.split_once('-')?;
    let nar_hash = NarHash::parse_base32(nar_hash.as_bytes()).ok()?;
    Some(NarUrl { hash: hash(part)?, nar_hash: Some(nar_hash) })
}

/// `<narhash>?hash=<hash>`, as harmonia and nix-serve write it.
fn harmonia_form(stem: &str, query: &str) -> Option<NarUrl> {
    let nar_hash = NarHash::parse_base32(stem.as_bytes()).ok()?;
    let part = query.split('&').find_map(|pair| pair.strip_prefix("hash="))?;
    Some(NarUrl { hash: hash(part)?, nar_hash: Some(nar_hash) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    const HASH: &str = "0c7m3lwpr40pp7ryi2yrnaw6y68a3knv";
    const NAR_HASH: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    fn nar(nar_hash: Option<&str>) -> Option<CacheUrl> {
        Some(CacheUrl::Nar(NarUrl {
            hash: hash(HASH).unwrap(),
            nar_hash: nar_hash.map(|text| NarHash::parse_base32(text.as_bytes()).unwrap()),
        }))
    }

    #[rstest]
    #[case::ours(format!("/nar/{HASH}-{NAR_HASH}.nar"), None, nar(Some(NAR_HASH)))]
    #[case::below(format!("/nix-cache/nar/{HASH}-{NAR_HASH}.nar"), None, nar(Some(NAR_HASH)))]
    #[case::flat(format!("/{HASH}-{NAR_HASH}.nar"), None, nar(Some(NAR_HASH)))]
    #[case::go(format!("/{HASH}.nar"), None, nar(None))]
    #[case::harmonia(format!("/nar/{NAR_HASH}.nar"), Some(format!("hash={HASH}")), nar(Some(NAR_HASH)))]
    #[case::no_hash(format!("/nar/{NAR_HASH}.nar"), None, None)]
    #[case::compressed(format!("/nar/{HASH}-{NAR_HASH}.nar.xz"), None, None)]
    #[case::packed_flat(format!("/{HASH}-{NAR_HASH}.nar.zst"), None, None)]
    #[case::packed_harmonia(format!("/nar/{NAR_HASH}.nar.zst"), Some(format!("hash={HASH}")), None)]
    #[case::packed(format!("/nix-cache/nar/{HASH}-{NAR_HASH}.nar.zst"), None,
        nar(Some(NAR_HASH)).map(|url| match url { CacheUrl::Nar(url) => CacheUrl::PackedNar(url), other => other }))]
    #[case::narinfo(format!("/nix-cache/{HASH}.narinfo"), None, Some(CacheUrl::NarInfo(hash(HASH).unwrap())))]
    #[case::listing(format!("/{HASH}.ls"), None, Some(CacheUrl::Listing(hash(HASH).unwrap())))]
    #[case::info("/nix-cache-info".to_owned(), None, Some(CacheUrl::CacheInfo))]
    #[case::log(format!("/log/{HASH}-a.drv"), None,
        Some(CacheUrl::Log(StorePath::from_basename(format!("{HASH}-a.drv").as_bytes()).unwrap())))]
    #[case::escaped(format!("/log/{HASH}%2Da%2B.drv"), None,
        Some(CacheUrl::Log(StorePath::from_basename(format!("{HASH}-a+.drv").as_bytes()).unwrap())))]
    #[case::escaped_slash(format!("/log%2F..%2F{HASH}-a.drv"), None, None)]
    #[case::log_of_an_output(format!("/log/{HASH}-a"), None, None)]
    #[case::traversal("/log/../../etc/passwd.drv".to_owned(), None, None)]
    #[case::twice(format!("/nix-cache/nix-cache/{HASH}.narinfo"), None, None)]
    fn a_url_is_parsed_or_refused(
        #[case] path: String,
        #[case] query: Option<String>,
        #[case] expected: Option<CacheUrl>,
    ) {
        assert_eq!(CacheUrl::parse(&path, query.as_deref()), expected);
    }

    #[test]
    fn the_url_of_a_peer_is_rebuilt_and_a_strange_one_is_refused() {
        let (part, nar_hash) = (hash(HASH).unwrap(), NarHash::parse_base32(NAR_HASH.as_bytes()).unwrap());
        let rebuilt = |given: &str| rebuilt_nar_path(given, &part, &nar_hash);
        for form in [
            format!("nar/{HASH}-{NAR_HASH}.nar"),
            format!("{HASH}-{NAR_HASH}.nar"),
            format!("{HASH}.nar"),
            format!("nar/{NAR_HASH}.nar?hash={HASH}"),
        ] {
            assert_eq!(rebuilt(&form), Some(form.clone()), "{form}");
        }
        let other = "1".repeat(52);
        for strange in [
            "http://10.0.0.1/x.nar".to_owned(),
            "../../etc/passwd.nar".to_owned(),
            format!("nar/{HASH}-{other}.nar"),
            format!("//elsewhere/nar/{HASH}-{NAR_HASH}.nar"),
            format!("nar/{NAR_HASH}.nar.xz"),
            // A peer is asked for what is hashed; how it travels is said in a header.
            format!("nar/{HASH}-{NAR_HASH}.nar.zst"),
        ] {
            assert_eq!(rebuilt(&strange), None, "{strange}");
        }
    }

    proptest! {
        #[test]
        fn our_own_paths_come_back(part in "[0-9a-df-np-sv-z]{32}", digest: [u8; 32]) {
            let url = NarUrl { hash: hash(&part).unwrap(), nar_hash: Some(NarHash::from_digest(digest)) };
            let path = nar_path(&url.hash, &url.nar_hash.unwrap());
            prop_assert_eq!(CacheUrl::parse(&format!("/{path}"), None), Some(CacheUrl::Nar(url)));
        }

        #[test]
        fn any_path_is_parsed_or_refused(path: String, query: Option<String>) {
            let _ = CacheUrl::parse(&path, query.as_deref());
            for (before, after) in [("/", ".narinfo"), ("/nar/", ".nar"), ("/log/", ".drv"), ("/", ".ls")] {
                let _ = CacheUrl::parse(&format!("{before}{path}{after}"), query.as_deref());
            }
        }
    }
}
