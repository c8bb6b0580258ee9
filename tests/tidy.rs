//! The shape of the source: layers look down only, files stay small, and each says what it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Each top-level module and what it may import. The same table stands in `src/lib.rs`.
const LAYERS: &[(&str, &[&str])] = &[
    ("nix", &[]),
    ("metrics", &[]),
    ("store", &["nix", "metrics"]),
    ("signing", &["nix"]),
    ("trust", &["nix"]),
    ("peer", &["nix", "metrics"]),
    ("cache", &["nix", "peer"]),
    ("resolve", &["nix", "metrics", "store", "signing", "trust", "peer", "cache"]),
    ("http", &["nix", "metrics", "resolve"]),
    ("config", &["http", "signing", "store", "trust", "peer", "cache", "resolve"]),
    (
        "daemon",
        &["nix", "metrics", "store", "signing", "trust", "peer", "cache", "resolve", "http", "config"],
    ),
    ("cli", &["nix", "metrics", "store", "signing", "peer", "resolve", "http", "config", "daemon"]),
];

/// Lines of a file before its tests.
const LONGEST_FILE: usize = 400;

fn source_files() -> Vec<(PathBuf, String)> {
    let (mut folders, mut files) = (vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push((path.clone(), fs::read_to_string(path).unwrap()));
            }
        }
    }
    assert!(files.len() > 20, "the source was not found");
    files
}

/// The part before the tests, which may import something for them.
fn code(text: &str) -> &str {
    let tests =
        ["mod", "pub(super) mod", "pub(crate) mod"].map(|module| format!("\n#[cfg(test)]\n{module} "));
    let end = tests.iter().filter_map(|begin| text.find(begin)).min();
    &text[..end.unwrap_or(text.len())]
}

fn module(path: &Path) -> String {
    let below = path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap();
    below.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The modules that are named behind `crate::`, alone or several in braces.
fn imports(code: &str) -> Vec<String> {
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = lines.collect::<Vec<_>>().join("\n");
    let first_word =
        |text: &str| text.trim().chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
    let mut names: Vec<String> = Vec::new();
    for part in code.split("crate::").skip(1) {
        match part.strip_prefix('{') {
            Some(several) => names.extend(several.split('}').next().unwrap().split(',').map(first_word)),
            None => names.push(first_word(part)),
        }
    }
    names
}

#[test]
fn imports_point_down_only() {
    let allowed: BTreeMap<&str, &[&str]> = LAYERS.iter().copied().collect();
    let mut wrong = Vec::new();
    for (path, text) in source_files() {
        let module = module(&path);
        if matches!(&*module, "lib" | "main") {
            continue;
        }
        let may = allowed.get(&*module).unwrap_or_else(|| panic!("{module} has no layer"));
        for name in imports(code(&text)) {
            let known = allowed.contains_key(&*name);
            if known && name != module && !may.contains(&&*name) {
                wrong.push(format!("{} imports {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_formats_do_no_io() {
    for (path, text) in source_files().into_iter().filter(|(path, _)| module(path) == "nix") {
        let lines = code(&text).lines().filter(|line| !line.trim_start().starts_with("//"));
        let code = lines.collect::<Vec<_>>().join("\n");
        for word in ["tokio", "std::fs", "std::net", "std::io", "Instant", "SystemTime", "std::process"] {
            assert!(!code.contains(word), "{} names {word}", path.display());
        }
    }
}

#[test]
fn every_file_says_what_it_is_and_stays_readable() {
    for (path, text) in source_files() {
        assert!(text.starts_with("//! "), "{} does not open with what it is", path.display());
        let lines = code(&text).lines().count();
        assert!(
            lines <= LONGEST_FILE,
            "{} has {lines} lines: which idea could have its own file?",
            path.display()
        );
    }
}

#[test]
fn the_table_of_layers_stands_in_the_map() {
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    for (module, _) in LAYERS {
        assert!(map.contains(&format!("//! | [`{module}`] |")), "{module} is not on the map");
        assert!(map.contains(&format!("pub mod {module};")), "{module} does not exist");
    }
}

#[test]
fn no_hash_path_or_address_is_a_label_of_a_metric() {
    let files = source_files().into_iter().filter(|(path, _)| module(path) == "metrics");
    let metrics: String = files.map(|(_, text)| text).collect();
    for (_, rest) in metrics.match_indices("EncodeLabelSet)]").map(|(at, _)| metrics.split_at(at)) {
        let fields = rest.split('}').next().unwrap();
        assert!(!fields.contains("String"), "a label without a bound: {fields}");
    }
}
