//! Every field of every narinfo is what Nix says of the path.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::daemon::Daemon;
use crate::support::http::get;
use crate::support::store::{Registration, Store};
use crate::support::{eventually, run, text};

/// One field of a narinfo; several of a kind are separated by spaces.
pub fn field(narinfo: &str, name: &str) -> Option<String> {
    let values = narinfo.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let values: Vec<&str> = values.collect();
    (!values.is_empty()).then(|| values.join(" "))
}

/// The hash part of a store path.
pub fn hash_part(path: &str) -> &str {
    &path["/nix/store/".len()..][..32]
}

pub fn narinfo(daemon: &Daemon, path: &str) -> String {
    let answer = get(&daemon.url(&format!("nix-cache/{}.narinfo", hash_part(path))));
    assert_eq!(answer.status, 200, "{path}");
    assert_eq!(answer.header("content-type"), Some("text/x-nix-narinfo"));
    answer.text()
}

/// Holds each field of these narinfos to what Nix says of the path, asked one by one.
pub fn check_fields(store: &Store, daemon: &Daemon, paths: &[&String]) {
    for path in paths {
        let told = narinfo(daemon, path);
        let asked = |query: &str| text(store.nix("nix-store").args(["--query", query, path]));
        let json = text(store.nix("nix").args(["path-info", "--json", path]));
        let json: Vec<Value> = serde_json::from_str(&json).unwrap();
        let is = |name: &str, expected: Option<String>| {
            assert_eq!(field(&told, name), expected, "{name} in\n{told}")
        };
        is("StorePath", Some((*path).clone()));
        is("Compression", Some("none".to_owned()));
        is("NarHash", Some(asked("--hash")));
        is("FileHash", Some(asked("--hash")));
        is("NarSize", Some(asked("--size")));
        is("FileSize", Some(asked("--size")));
        is("URL", Some(format!("nar/{}-{}.nar", hash_part(path), &asked("--hash")["sha256:".len()..])));
        let base = |path: &str| path.trim_start_matches("/nix/store/").to_owned();
        let references: Vec<String> = asked("--references").lines().map(base).collect();
        is("References", Some(references.join(" ")));
        is("Deriver", json[0]["deriver"].as_str().map(base));
        is("CA", json[0]["ca"].as_str().map(str::to_owned));
        assert_eq!(json[0]["narSize"].to_string(), asked("--size"));
    }
}

/// A store of thousands of paths: texts that refer to each other, and one of each kind that is special.
fn varied_store() -> Store {
    let store = Store::new();
    let letters = "0123456789abcdfghijklmnpqrsvwxyz".as_bytes();
    let path = |number: usize, name: &str| {
        let digits = (0..32).map(|place| letters[(number >> (place % 6 * 5)) % 32] as char);
        format!("/nix/store/{}-{name}", digits.collect::<String>())
    };
    let files: Vec<_> = (0..3000)
        .map(|i| {
            let references =
                (i % 7..i % 50).map(|j| path(i * j % (i + 1), &format!("text-{}", i * j % (i + 1))));
            let mut references: Vec<String> = references.collect();
            if i % 3 == 0 {
                references.push(path(i, &format!("text-{i}")));
            }
            references.sort();
            references.dedup();
            (path(i, &format!("text-{i}")), format!("text {i}").into_bytes(), references)
        })
        .collect();
    store.register_files(&files);

    let itself = path(5000, "itself+with.odd_name?=1");
    std::fs::create_dir(store.real(&itself)).unwrap();
    std::fs::write(store.real(&itself).join("me"), &itself).unwrap();
    let deriver = path(5001, "itself.drv");
    let link = path(5002, "link");
    std::os::unix::fs::symlink(&itself, store.real(&link)).unwrap();
    store.register(&[
        Registration { path: &itself, deriver: &deriver, references: &[&itself] },
        Registration { path: &link, deriver: "", references: &[&itself] },
    ]);
    // Content-addressed in each way that this Nix has, and built.
    store.add_text("Cargo.lock", "a path whose name looks like that of a lock");
    let file = store.root().join("fixed");
    std::fs::write(&file, "fixed").unwrap();
    text(store.nix("nix-store").args(["--add-fixed", "sha256"]).arg(&file));
    text(store.nix("nix-store").args(["--add-fixed", "--recursive", "sha1"]).arg(&file));
    store.build(
        r#"let t = builtins.toFile "t" "text"; in derivation {
             name = "built"; system = builtins.currentSystem; builder = "/bin/sh";
             args = [ "-c" "echo ${t} $out > $out" ]; }"#,
    );
    store
}

#[test]
fn every_field_is_what_nix_says() {
    let store = varied_store();
    let daemon = Daemon::serve(store.root(), "");
    let json = text(store.nix("nix").args(["path-info", "--all", "--json"]));
    let json: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert!(json.len() > 3000, "{} paths", json.len());
    let paths: Vec<&str> = json.iter().map(|info| info["path"].as_str().unwrap()).collect();
    let queried = |query: &str| -> Vec<String> {
        let answer = text(store.nix("nix-store").args(["--query", query]).args(&paths));
        answer.lines().map(str::to_owned).collect()
    };
    let (hashes, sizes, derivers) = (queried("--hash"), queried("--size"), queried("--deriver"));
    let (mut with_ca, mut with_deriver, mut with_itself) = (0, 0, 0);
    for (index, info) in json.iter().enumerate() {
        let path = paths[index];
        let told = narinfo(&daemon, path);
        let is = |name: &str, expected: Option<String>| {
            assert_eq!(field(&told, name), expected, "{name} in\n{told}")
        };
        let base = |path: &str| path.strip_prefix("/nix/store/").unwrap().to_owned();
        let some = |value: &Value| value.as_str().map(str::to_owned);
        is("StorePath", Some(path.to_owned()));
        is("Compression", Some("none".to_owned()));
        is("NarHash", Some(hashes[index].clone()));
        is("NarSize", Some(sizes[index].clone()));
        is("FileHash", Some(hashes[index].clone()));
        is("FileSize", Some(sizes[index].clone()));
        assert_eq!(info["narSize"].to_string(), sizes[index]);
        let hash = &hashes[index]["sha256:".len()..];
        is("URL", Some(format!("nar/{}-{hash}.nar", hash_part(path))));
        let references: BTreeSet<String> =
            info["references"].as_array().unwrap().iter().map(|path| base(path.as_str().unwrap())).collect();
        let references: Vec<String> = references.into_iter().collect();
        assert!(
            told.contains(&format!("\nReferences: {}\n", references.join(" "))),
            "{references:?} in\n{told}"
        );
        let deriver = some(&info["deriver"]).map(|path| base(&path));
        assert_eq!(
            deriver.as_deref().unwrap_or("unknown-deriver"),
            derivers[index].trim_start_matches("/nix/store/")
        );
        with_deriver += u32::from(deriver.is_some());
        is("Deriver", deriver);
        with_ca += u32::from(info.get("ca").is_some());
        is("CA", info.get("ca").and_then(some));
        with_itself += u32::from(references.iter().any(|reference| *reference == base(path)));
        let sig = field(&told, "Sig").unwrap_or_default();
        assert_eq!(sig.split(' ').count(), 1, "ours alone in\n{told}");
    }
    assert!(
        with_ca >= 5 && with_deriver >= 2 && with_itself >= 1000,
        "{with_ca} {with_deriver} {with_itself}"
    );
    // Each was asked about once, however often it was served.
    let queries = daemon.metric("peernix_store_queries_total");
    for path in &paths {
        narinfo(&daemon, path);
    }
    assert_eq!(daemon.metric("peernix_store_queries_total"), queries);
    // The references of one path, asked the other way.
    for path in paths.iter().step_by(200) {
        let told = text(store.nix("nix-store").args(["--query", "--references", path]));
        let told: BTreeSet<&str> = told.lines().map(|path| path.trim_start_matches("/nix/store/")).collect();
        let ours = field(&narinfo(&daemon, path), "References").unwrap_or_default();
        assert_eq!(ours.split_whitespace().collect::<BTreeSet<_>>(), told);
    }
}

#[test]
fn a_path_is_found_from_its_first_moment() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "");
    for round in 0..10 {
        let path = store.add_text(&format!("text-{round}"), "text");
        assert_eq!(get(&daemon.url(&format!("{}.narinfo", hash_part(&path)))).status, 200, "round {round}");
    }
    // Nothing was scanned but at start: each change came as an event.
    assert_eq!(daemon.metric("peernix_store_scans_total"), 1.0);
}

#[test]
fn a_path_that_is_deleted_is_gone_and_one_that_comes_back_is_the_new_one() {
    let store = Store::new();
    let path = format!("/nix/store/{}-rebuilt", "5".repeat(32));
    let daemon = Daemon::serve(store.root(), "lease = \"1s\"");
    let url = daemon.url(&format!("{}.narinfo", hash_part(&path)));
    let mut hashes = BTreeSet::new();
    for round in 0..3 {
        store.register_files(&[(path.clone(), format!("build {round}").into_bytes(), Vec::new())]);
        assert!(hashes.insert(field(&narinfo(&daemon, &path), "NarHash").unwrap()), "an old narinfo");
        // What is remembered is so for longer than it is leased.
        eventually("Nix deletes it", || {
            run(store.nix("nix-store").args(["--delete", &path])).status.success().then_some(())
        });
        assert_eq!(get(&url).status, 404, "round {round}");
    }
}

#[test]
fn a_lock_or_a_half_built_path_is_no_path() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "");
    let path = format!("/nix/store/{}-half", "0".repeat(32));
    let url = daemon.url(&format!("{}.narinfo", "0".repeat(32)));
    std::fs::write(store.real(&format!("{path}.lock")), "").unwrap();
    assert_eq!(get(&url).status, 404);
    // A question would have left a root.
    assert_eq!(daemon.metric("peernix_store_queries_total"), 0.0);
    std::fs::write(store.real(&path), "half built").unwrap();
    assert_eq!(get(&url).status, 404);
    store.register_files(&[(path.clone(), b"built".to_vec(), Vec::new())]);
    let answer = get(&url);
    assert_eq!(answer.status, 200);
    assert_eq!(field(&answer.text(), "StorePath"), Some(path));
}

#[test]
fn what_is_only_named_like_a_lock_is_a_path() {
    let store = Store::new();
    let file = store.add_text("flake.lock", "{}");
    let link = store.root().join("poetry.lock");
    std::os::unix::fs::symlink("elsewhere", &link).unwrap();
    let link = store.add(&link);
    let daemon = Daemon::serve(store.root(), "");
    for path in [file, link] {
        assert_eq!(field(&narinfo(&daemon, &path), "StorePath"), Some(path));
    }
}
