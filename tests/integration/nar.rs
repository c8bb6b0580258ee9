//! Every NAR is what `nix-store --dump` writes, and every range is that part of it.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use crate::narinfo::{check_fields, field, hash_part, narinfo};
use crate::support::daemon::Daemon;
use crate::support::http::{get, get_with, head};
use crate::support::store::{Digested, Registration, Store, dumped, isolated};
use crate::support::{eventually, succeed};

fn nar_url(daemon: &Daemon, path: &str) -> String {
    daemon.url(&format!("nix-cache/{}", field(&narinfo(daemon, path), "URL").unwrap()))
}

fn dump(store: &Store, path: &str) -> Vec<u8> {
    succeed(isolated("nix-store", store.root()).arg("--dump").arg(store.real(path)))
}

/// Registers what lies at a path as it is.
fn register(store: &Store, path: &str) {
    store.register(&[Registration { path, deriver: "", references: &[] }]);
}

/// A tree with everything that a NAR can hold, and names that are awkward.
fn odd_tree(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let awkward: [&[u8]; 8] = [
        b"with space",
        b".dot",
        b"..dots",
        b"plus+sign",
        "gr\u{fc}n-\u{6f22}".as_bytes(),
        b"new\nline",
        b"~",
        b"\xff\xfe",
    ];
    for name in awkward {
        fs::write(folder.join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }
    fs::write(folder.join("empty"), "").unwrap();
    fs::create_dir_all(folder.join("empty-directory/and/another")).unwrap();
    for size in 1..18 {
        fs::write(folder.join(format!("size-{size}")), vec![b'x'; size]).unwrap();
    }
    fs::write(folder.join("program"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(folder.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("../elsewhere", folder.join("link")).unwrap();
    symlink("dangling target with spaces", folder.join("link 2")).unwrap();
}

#[test]
fn every_kind_of_tree_is_what_nix_dumps() {
    let store = Store::new();
    let path = |name: &str| {
        format!("/nix/store/{}-{name}", &format!("{:0>32}", name.replace(['e', 'o', 't', 'u'], "z"))[..32])
    };
    let odd = path("add");
    odd_tree(&store.real(&odd));

    let many = path("many");
    for folder in 0..200 {
        let folder = store.real(&many).join(format!("d{folder}"));
        fs::create_dir_all(&folder).unwrap();
        for file in 0..100 {
            fs::write(folder.join(format!("f{file}")), format!("{file}").repeat(file * 3)).unwrap();
        }
    }
    let deep = path("dccp");
    let levels = (0..120).fold(store.real(&deep), |place, level| place.join(format!("level-{level}")));
    fs::create_dir_all(&levels).unwrap();
    fs::write(levels.join("bottom"), "found").unwrap();

    let file = path("fil");
    fs::write(store.real(&file), vec![7; 1_000_003]).unwrap();
    let program = path("prgram");
    fs::write(store.real(&program), "#!/bin/sh\n").unwrap();
    fs::set_permissions(store.real(&program), fs::Permissions::from_mode(0o555)).unwrap();
    let link = path("link");
    symlink("/nix/store/nowhere", store.real(&link)).unwrap();
    let empty = path("mpy");
    fs::write(store.real(&empty), "").unwrap();
    let folder = path("fldr");
    fs::create_dir(store.real(&folder)).unwrap();

    let all = [&odd, &many, &deep, &file, &program, &link, &empty, &folder];
    for path in all {
        register(&store, path);
    }
    let daemon = Daemon::serve(store.root(), "");
    check_fields(&store, &daemon, &all);
    for path in all {
        let answer = get(&nar_url(&daemon, path));
        assert_eq!(answer.status, 200, "{path}");
        assert_eq!(answer.header("content-type"), Some("application/x-nix-nar"));
        let expected = dump(&store, path);
        assert_eq!(answer.header("content-length"), Some(&*expected.len().to_string()));
        assert!(answer.bytes() == expected, "{path}");
    }
}

/// A path of 4,000 files that come to 6.4 MB.
pub fn many_small_files(store: &Store, number: u32) -> String {
    let path = format!("/nix/store/{}-many", number.to_string().repeat(32));
    for folder in 0..40 {
        let folder = store.real(&path).join(format!("d{folder}"));
        fs::create_dir_all(&folder).unwrap();
        for file in 0..100 {
            fs::write(folder.join(format!("f{file}")), format!("{file}").repeat(900 + file)).unwrap();
        }
    }
    register(store, &path);
    path
}

#[test]
fn a_nar_of_many_small_files_is_the_same_to_all_who_ask_with_and_without_a_copy() {
    let store = Store::new();
    let path = many_small_files(&store, 4);
    let expected = dump(&store, &path);
    // Copied, not copied, and no room for a copy; much room is no reason to copy less.
    let settings = [("", true), ("0 B", false), ("16 MiB", false), ("64 MiB", true), ("8 GiB", true)];
    for (room, copied) in settings {
        let limit = if room.is_empty() { String::new() } else { format!("[limits]\nnar_copies = {room:?}") };
        let daemon = Daemon::serve(store.root(), &limit);
        let url = nar_url(&daemon, &path);
        // A part alone is read from the tree, and makes no copy.
        assert!(get_with(&url, &[("Range", "bytes=0-99")]).bytes() == expected[..100], "{room}");
        assert_eq!(daemon.metric("peernix_nar_copies_bytes"), 0.0, "{room}");
        for _ in 0..2 {
            std::thread::scope(|scope| {
                for _ in 0..6 {
                    scope.spawn(|| assert!(get(&url).bytes() == expected, "{room}"));
                }
            });
            let part = get_with(&url, &[("Range", "bytes=5000001-6000000")]);
            assert!(part.bytes() == expected[5_000_001..=6_000_000], "{room}");
        }
        let (served, bytes) = if copied { (14.0, expected.len() as f64) } else { (0.0, 0.0) };
        assert_eq!(daemon.metric("peernix_nars_from_copies_total"), served, "{room}");
        assert_eq!(daemon.metric("peernix_nar_copies_bytes"), bytes, "{room}");
    }
    // Read while it is laid out, for six who ask at once and first of all.
    let daemon = Daemon::serve(store.root(), "");
    let url = nar_url(&daemon, &path);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| assert!(get(&url).bytes() == expected));
        }
    });
    assert_eq!(daemon.metric("peernix_nars_from_copies_total"), 6.0);
    assert_eq!(daemon.metric("peernix_nar_copies_bytes"), expected.len() as f64);
}

#[test]
fn a_tree_of_many_small_files_that_is_not_what_the_database_says_is_404_and_leaves_nothing() {
    let store = Store::new();
    for (number, files) in [(4, 3000), (5, 1)] {
        let path = many_small_files(&store, number);
        let daemon = Daemon::serve(store.root(), "[limits]\nnar_copies = \"40 MiB\"");
        let url = nar_url(&daemon, &path);
        // More than there is room for, and just another length.
        for file in 0..files {
            let extra = format!("d20/extra-{file}");
            fs::write(store.real(&path).join(extra), vec![b'x'; 6000]).unwrap();
        }
        assert_eq!(get(&url).status, 404);
        eventually("nothing is left", || (daemon.metric("peernix_nar_copies_bytes") == 0.0).then_some(()));
    }
}

#[test]
fn copies_take_no_more_room_than_they_may_whoever_still_reads() {
    let store = Store::new();
    let paths: Vec<String> = (0..6).map(|at| many_small_files(&store, at)).collect();
    // Room for four.
    let daemon = Daemon::serve(store.root(), "[limits]\nnar_copies = \"36 MiB\"");
    let most = f64::from(36 << 20);
    let (bytes, from_copies) = ("peernix_nar_copies_bytes", "peernix_nars_from_copies_total");
    let mut slow: Vec<_> = Vec::new();
    for path in &paths {
        let expected = dump(&store, path);
        let mut answer = get(&nar_url(&daemon, path)).reader();
        let mut first = vec![0; 1000];
        answer.read_exact(&mut first).unwrap();
        assert!(first == expected[..1000]);
        slow.push((answer, first, expected));
        assert!(daemon.metric(bytes) <= most);
    }
    for (mut answer, mut read, expected) in slow {
        answer.read_to_end(&mut read).unwrap();
        assert!(read == expected);
    }
    // Nobody reads them any more: they make room for the others.
    for path in &paths {
        eventually("it is copied", || {
            let before = daemon.metric(from_copies);
            assert!(get(&nar_url(&daemon, path)).bytes() == dump(&store, path));
            (daemon.metric(from_copies) > before).then_some(())
        });
        assert!(daemon.metric(bytes) <= most);
    }
}

#[test]
fn every_range_is_that_part_of_the_nar() {
    let store = Store::new();
    let path = format!("/nix/store/{}-odd", "1".repeat(32));
    odd_tree(&store.real(&path));
    register(&store, &path);
    let daemon = Daemon::serve(store.root(), "");
    let (url, nar) = (nar_url(&daemon, &path), dump(&store, &path));
    let len = nar.len();
    // Every beginning, with lengths that end before, at and after the next pieces; then the forms of the header.
    for first in 0..len {
        let last = (first + first * 7 % 300).min(len - 1);
        let answer = get_with(&url, &[("range", &format!("bytes={first}-{last}"))]);
        assert_eq!(answer.status, 206);
        assert_eq!(answer.header("content-range"), Some(&*format!("bytes {first}-{last}/{len}")));
        assert!(answer.bytes() == nar[first..=last], "{first}-{last}");
    }
    for (range, expected) in
        [("bytes=0-", &nar[..]), ("bytes=-5", &nar[len - 5..]), ("bytes=100-999999999", &nar[100..])]
    {
        let answer = get_with(&url, &[("range", range)]);
        assert_eq!((answer.status, answer.bytes() == expected), (206, true), "{range}");
    }
    let beyond = get_with(&url, &[("range", &format!("bytes={len}-"))]);
    assert_eq!((beyond.status, beyond.header("content-range")), (416, Some(&*format!("bytes */{len}"))));
    for range in ["bytes=0-1,4-5", "bytes=x-", "lines=1-2"] {
        assert_eq!(get_with(&url, &[("range", range)]).bytes(), nar, "{range}");
    }
    let other = get_with(&url, &[("range", "bytes=5-"), ("if-range", "\"another\"")]);
    assert_eq!((other.status, other.bytes() == nar), (200, true));
    let tag = head(&url).header("etag").unwrap().to_owned();
    assert_eq!(get_with(&url, &[("range", "bytes=5-"), ("if-range", &tag)]).status, 206);
}

#[test]
fn a_file_of_more_than_four_gigabytes_is_what_nix_dumps() {
    let store = Store::new();
    let path = format!("/nix/store/{}-sparse", "4".repeat(32));
    let file = fs::File::create(store.real(&path)).unwrap();
    let size = (4u64 << 30) + 4099;
    file.set_len(size).unwrap();
    (&file).write_all(b"begins here").unwrap();
    // Hashed by Nix itself, once.
    let (hash, len) = dumped(&store.real(&path));
    store.register(&[Registration { path: &path, deriver: "", references: &[] }]);
    let daemon = Daemon::serve(store.root(), "");
    check_fields(&store, &daemon, &[&path]);
    let url = nar_url(&daemon, &path);
    let served = Digested::read(get(&url).reader());
    assert_eq!((served.hash, served.len), (hash, len));
    let end = get_with(&url, &[("range", &format!("bytes={}-", (4u64 << 30) + 100))]);
    assert_eq!(end.header("content-length").unwrap(), (len - (4u64 << 30) - 100).to_string());
    assert!(end.bytes().ends_with(b"\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0"));
}

#[test]
fn older_urls_heads_and_what_is_no_url() {
    let store = Store::new();
    let path = store.add_text("text", "text");
    let daemon = Daemon::serve(store.root(), "");
    let (part, nar) = (hash_part(&path), dump(&store, &path));
    let hash = field(&narinfo(&daemon, &path), "NarHash").unwrap();
    let hash = &hash["sha256:".len()..];
    for url in [
        format!("nar/{part}-{hash}.nar"),
        format!("nix-cache/nar/{part}-{hash}.nar"),
        format!("{part}-{hash}.nar"),
        format!("{part}.nar"),
        format!("nar/{hash}.nar?hash={part}"),
    ] {
        assert!(get(&daemon.url(&url)).bytes() == nar, "{url}");
        let answer = head(&daemon.url(&url));
        assert_eq!(
            (answer.status, answer.header("content-length")),
            (200, Some(&*nar.len().to_string())),
            "{url}"
        );
        assert_eq!(answer.header("accept-ranges"), Some("bytes"));
    }
    let other = "0".repeat(52);
    for url in [
        format!("nar/{part}-{other}.nar"),
        format!("nar/{other}.nar?hash={part}"),
        format!("nar/{hash}.nar"),
        format!("nar/{part}-{hash}.nar.xz"),
        format!("{}.narinfo", "0".repeat(32)),
        format!("{}.narinfo", "e".repeat(32)),
        format!("{part}x.narinfo"),
        "nar/../../etc/passwd".to_owned(),
        "%2e%2e/%2e%2e/etc/passwd".to_owned(),
        "log/x.drv".to_owned(),
        "realisations/sha256:abc!out.doi".to_owned(),
    ] {
        assert_eq!(get(&daemon.url(&url)).status, 404, "{url}");
    }
    let narinfo = head(&daemon.url(&format!("{part}.narinfo")));
    assert!(narinfo.header("content-length").unwrap().parse::<u64>().unwrap() > 100);
    assert_eq!(
        get(&daemon.url("nix-cache-info")).text(),
        "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
    );
    assert_eq!(get(&daemon.url("nix-cache/nix-cache-info")).status, 200);
}

#[test]
fn listings_and_logs_are_what_nix_writes() {
    let store = Store::new();
    let tree = store.root().join("tree");
    fs::create_dir_all(tree.join("bin/deep")).unwrap();
    fs::write(tree.join("bin/program"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("bin/program"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(tree.join("bin/deep/gr\u{fc}n \"quoted\""), "x").unwrap();
    symlink("bin/program", tree.join("link")).unwrap();
    let path = store.add(&tree);
    let cache = store.root().join("cache");
    let target = format!("file://{}?write-nar-listing=1&compression=none", cache.display());
    succeed(store.nix("nix").args(["copy", "--to", &target, &path]));
    let daemon = Daemon::serve(store.root(), "");
    let ours = get(&daemon.url(&format!("nix-cache/{}.ls", hash_part(&path)))).text();
    let theirs = fs::read_to_string(cache.join(format!("{}.ls", hash_part(&path)))).unwrap();
    assert_eq!(ours, theirs);

    let script = "echo this is the log >&2; echo > $out";
    let expression = |script: &str| {
        format!(
            r#"derivation {{ name = "logged"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "{script}" ]; }}"#
        )
    };
    let built = store.build(&expression(script));
    let derivation = crate::support::text(store.nix("nix-store").args(["--query", "--deriver", &built[0]]));
    let name = derivation.trim_start_matches("/nix/store/");
    let log = get(&daemon.url(&format!("log/{name}")));
    assert_eq!((log.status, log.text().as_str()), (200, "this is the log\n"));
    // Nix itself reads it through the cache.
    let mut read = isolated("nix", store.root());
    let read = succeed(read.args(["log", "--store", &daemon.substituter(), &derivation]));
    assert_eq!(String::from_utf8(read).unwrap(), "this is the log\n");
}

/// Begins to read a NAR of several megabytes and stops after its first bytes.
fn half_read(daemon: &Daemon, path: &str) -> (BufReader<TcpStream>, usize) {
    let url = field(&narinfo(daemon, path), "URL").unwrap();
    let mut socket = TcpStream::connect(daemon.address).unwrap();
    write!(socket, "GET /{url} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = BufReader::with_capacity(1024, socket);
    let mut len = 0;
    loop {
        let mut line = String::new();
        answer.read_line(&mut line).unwrap();
        if let Some(value) = line.strip_prefix("content-length: ") {
            len = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            return (answer, len);
        }
    }
}

#[test]
fn a_file_that_goes_missing_gets_short_or_changes_cuts_the_connection() {
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 6] = [
        ("missing", |folder| fs::remove_file(folder.join("z")).unwrap()),
        ("short", |folder| {
            fs::File::options().write(true).open(folder.join("z")).unwrap().set_len(5).unwrap()
        }),
        ("short while it is sent", |folder| {
            fs::File::options().write(true).open(folder.join("a")).unwrap().set_len(5).unwrap()
        }),
        ("longer", |folder| {
            fs::File::options().append(true).open(folder.join("z")).unwrap().write_all(b"x").unwrap()
        }),
        ("rewritten", |folder| fs::write(folder.join("z"), vec![9; 4096]).unwrap()),
        ("now a pipe", |folder| {
            fs::remove_file(folder.join("z")).unwrap();
            succeed(std::process::Command::new("mkfifo").arg(folder.join("z")));
        }),
    ];
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "");
    for (index, (harm, inflict)) in harms.into_iter().enumerate() {
        let path = format!("/nix/store/{}-harmed", index.to_string().repeat(32));
        fs::create_dir(store.real(&path)).unwrap();
        // More than any socket buffers, so that the server still has to read the last file.
        fs::write(store.real(&path).join("a"), vec![1; 64 << 20]).unwrap();
        fs::write(store.real(&path).join("z"), vec![2; 4096]).unwrap();
        register(&store, &path);
        let url = nar_url(&daemon, &path);
        let (mut answer, len) = half_read(&daemon, &path);
        inflict(&store.real(&path));
        let mut got = Vec::new();
        // Either an end before the length, or a reset: never the announced length.
        let _ = answer.read_to_end(&mut got);
        assert!(got.len() < len, "{harm}: {} of {len} bytes", got.len());
        eventually("the cut is counted", || {
            (daemon.metric("peernix_http_nar_cuts_total") == (index + 1) as f64).then_some(())
        });
        eventually("the log says which", || {
            let said = daemon.logged("a NAR was cut short; the client was told by a closed connection");
            (said.last()?["store_path"] == *path).then_some(())
        });
        // It is not promised again, unless it has the length that the database says.
        assert_eq!(get(&url).status, if harm == "rewritten" { 200 } else { 404 }, "{harm}");
    }
}

#[test]
fn a_path_that_cannot_be_copied_keeps_no_other_from_being() {
    let store = Store::new();
    let [bad, good] = [4, 5].map(|number| many_small_files(&store, number));
    let daemon = Daemon::serve(store.root(), "");
    let url = nar_url(&daemon, &bad);
    // Laid out, and not copied.
    assert_eq!(get_with(&url, &[("Range", "bytes=0-99")]).status, 206);
    fs::write(store.real(&bad).join("d9/f99"), "another").unwrap();
    let _ = get(&url).reader().read_to_end(&mut Vec::new());
    assert!(get(&nar_url(&daemon, &good)).bytes() == dump(&store, &good));
    let expected = dump(&store, &good).len() as f64;
    eventually("it is copied", || (daemon.metric("peernix_nar_copies_bytes") == expected).then_some(()));
}

#[test]
fn a_tree_that_is_not_what_the_database_says_is_refused_before_its_first_byte() {
    let store = Store::new();
    let path = format!("/nix/store/{}-half", "7".repeat(32));
    fs::create_dir(store.real(&path)).unwrap();
    fs::write(store.real(&path).join("a"), "a").unwrap();
    fs::write(store.real(&path).join("b"), "b").unwrap();
    register(&store, &path);
    let daemon = Daemon::serve(store.root(), "");
    let url = nar_url(&daemon, &path);
    assert_eq!(get(&url).status, 200);
    fs::remove_file(store.real(&path).join("b")).unwrap();
    assert_eq!(get(&url).status, 404);
    eventually("the log says why", || {
        daemon.log().iter().any(|line| line.contains("it is being deleted, or damaged")).then_some(())
    });
}
