//! `nix-cache-info`: what a binary cache says about itself.

use thiserror::Error;

/// What a binary cache says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheInfo {
    /// The store directory that its paths lie in; a client with another one refuses the cache.
    pub store_dir: String,
    /// Whether clients may ask for many paths before a build.
    pub want_mass_query: bool,
    /// Which cache is asked first: the lower, the earlier. cache.nixos.org has 40.
    pub priority: u32,
}

/// Why a text is not a `nix-cache-info`.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CacheInfoError {
    /// More bytes than any cache needs.
    #[error("nix-cache-info has {0} bytes, more than {MAX_SIZE}")]
    TooLarge(usize),
    /// A line without a colon.
    #[error("nix-cache-info line {0} has no colon")]
    MalformedLine(usize),
    /// A number that is none.
    #[error("nix-cache-info line {0} has no number where one belongs")]
    InvalidNumber(usize),
    /// Nix needs StoreDir to accept a cache.
    #[error("nix-cache-info has no StoreDir")]
    MissingStoreDir,
}

/// The largest `nix-cache-info` that is read, in bytes.
pub const MAX_SIZE: usize = 16 * 1024;

impl CacheInfo {
    /// Reads it; unknown keys are passed over, as Nix does. Nix's own defaults: no mass query, priority 50.
    pub fn parse(text: &str) -> Result<Self, CacheInfoError> {
        if text.len() > MAX_SIZE {
            return Err(CacheInfoError::TooLarge(text.len()));
        }
        let (mut store_dir, mut want_mass_query, mut priority) = (None, false, 50);
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let (key, value) = line.split_once(':').ok_or(CacheInfoError::MalformedLine(index + 1))?;
            let value = value.trim();
            match key {
                "StoreDir" => store_dir = Some(value.to_owned()),
                "WantMassQuery" => want_mass_query = value == "1",
                "Priority" => {
                    priority = value.parse().map_err(|_| CacheInfoError::InvalidNumber(index + 1))?;
                }
                _ => {}
            }
        }
        let store_dir = store_dir.ok_or(CacheInfoError::MissingStoreDir)?;
        Ok(Self { store_dir, want_mass_query, priority })
    }

    /// Writes it.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!(
            "StoreDir: {}\nWantMassQuery: {}\nPriority: {}\n",
            self.store_dir,
            u8::from(self.want_mass_query),
            self.priority
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_cache_info_survives_its_text(want_mass_query: bool, priority: u32) {
            let info = CacheInfo { store_dir: "/nix/store".to_owned(), want_mass_query, priority };
            prop_assert_eq!(CacheInfo::parse(&info.to_text()).unwrap(), info);
        }

        #[test]
        fn any_text_is_a_cache_info_or_an_error(text: String) {
            let _ = CacheInfo::parse(&text);
        }
    }
}
