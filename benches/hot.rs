//! The functions that run for every request or every byte, by criterion: `cargo bench --bench hot`.
//!
//! nixbase32, narinfo, signatures, the layout of a tree, and a NAR streamed from disk by the store itself. Figures hold
//! for one machine and one moment; compare them within a run.

#![allow(missing_docs, reason = "criterion's macros make public functions without documentation")]

use std::hint::black_box;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use peernix::nix::layout::{Cursor, FileMeta, LayoutBuilder, NarLayout, Step};
use peernix::nix::narinfo::{NarFile, NarInfo, PathInfo};
use peernix::nix::secret_key::SecretKey;
use peernix::nix::{NarHash, StoreDir, StorePath, StorePathHash};

/// A path as it is usual: eight references, a deriver, one stored signature.
fn path_info() -> PathInfo {
    let path = |n: usize| {
        let name = format!("{:0>32}-some-library-1.2.{n}", n);
        StorePath::from_basename(name.as_bytes()).expect("a store path")
    };
    let mut info = PathInfo {
        store_path: path(0),
        nar_hash: NarHash::from_digest([7; 32]),
        nar_size: 123_456,
        references: (0..8).map(path).collect(),
        deriver: Some(path(9)),
        signatures: Vec::new(),
        ca: None,
    };
    let fingerprint = info.fingerprint(&StoreDir::default()).expect("a fingerprint");
    info.signatures.push(key().sign(&fingerprint));
    info
}

fn key() -> SecretKey {
    SecretKey::from_seed("bench-1", [1; 32]).expect("a key")
}

fn formats(c: &mut Criterion) {
    let store_dir = StoreDir::default();
    let hash = StorePathHash::of(&path_info().store_path);
    let text = hash.to_string();
    c.bench_function("nixbase32: write a hash part", |b| b.iter(|| black_box(&hash).to_string()));
    c.bench_function("nixbase32: read a hash part", |b| {
        b.iter(|| StorePathHash::parse(black_box(text.as_bytes())))
    });
    let nar_hash = NarHash::from_digest([7; 32]);
    c.bench_function("nixbase32: write a NAR hash", |b| b.iter(|| black_box(&nar_hash).to_base32()));

    let info = path_info();
    let file = NarFile::plain(&info);
    let narinfo = NarInfo { info: info.clone(), file, extensions: Vec::new() };
    let text = narinfo.to_text(&store_dir).expect("a narinfo");
    c.bench_function("narinfo: print", |b| b.iter(|| black_box(&narinfo).to_text(&store_dir)));
    c.bench_function("narinfo: parse", |b| b.iter(|| NarInfo::parse(black_box(&text), &store_dir)));
    let (key, fingerprint) = (key(), info.fingerprint(&store_dir).expect("a fingerprint"));
    c.bench_function("narinfo: fingerprint", |b| b.iter(|| black_box(&info).fingerprint(&store_dir)));
    c.bench_function("signature: sign", |b| b.iter(|| key.sign(black_box(&fingerprint))));
    let keys = [key.public_key()];
    c.bench_function("signature: verify", |b| b.iter(|| black_box(&info).is_signed_by(&keys, &store_dir)));
}

/// 20,000 files of a kilobyte in 200 directories.
fn layout() -> NarLayout {
    let mut builder = LayoutBuilder::default();
    builder.directory(b"").expect("a root");
    for folder in 0..200 {
        builder.directory(format!("d{folder:03}").as_bytes()).expect("a directory");
        for file in 0..100 {
            let meta = FileMeta { size: 1000, executable: false, modified_ns: 0 };
            builder.file(format!("f{file:02}").as_bytes(), meta).expect("a file");
        }
        builder.end().expect("an end");
    }
    builder.end().expect("an end");
    builder.finish().expect("a layout")
}

fn layouts(c: &mut Criterion) {
    c.bench_function("layout: 20,000 files", |b| b.iter(layout));
    let layout = layout();
    c.bench_function("layout: literal bytes of 20,000 files", |b| {
        b.iter_batched_ref(
            || Vec::with_capacity(4096),
            |out| {
                let mut cursor = Cursor::default();
                while cursor.advance(&layout, out) != Step::Finished {
                    out.clear();
                }
            },
            BatchSize::SmallInput,
        );
    });
}

/// A store of one path, known to Nix, and the store's own stream of it.
fn stream(c: &mut Criterion, name: &str, fill: impl Fn(&Path)) {
    let root = tempfile::tempdir().expect("a temporary folder");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let basename = format!("{}-bench", "0".repeat(32));
    let path = root.path().join("nix/store").join(&basename);
    std::fs::create_dir_all(path.parent().expect("a parent")).expect("a store");
    fill(&path);
    let (hash, size) = dumped(&path);
    let database = format!("/nix/store/{basename}\n{hash}\n{size}\n\n0\n");
    load(root.path(), &database);

    let options = peernix::store::Options { root: Some(root.path().to_owned()), ..Default::default() };
    let metrics = peernix::metrics::Metrics::new();
    let _entered = runtime.enter();
    let copies = peernix::store::NarCopies::new(None, 0, &metrics.store);
    let gained = tokio::sync::mpsc::channel(1).0;
    let (store, _task) =
        peernix::store::Store::open(options, None, copies, &metrics.store, gained).expect("a store");
    let part = StorePathHash::parse("0".repeat(32).as_bytes()).expect("a hash part");
    let known = runtime.block_on(store.path(&part)).expect("an answer").expect("a path");
    let mut group = c.benchmark_group("NAR");
    group.throughput(Throughput::Bytes(size)).sample_size(10);
    group.bench_function(name, |b| {
        b.iter(|| {
            runtime.block_on(async {
                use futures_util::StreamExt as _;
                let mut stream = store.nar(&known, 0..size).await.expect("a stream");
                let mut total = 0;
                while let Some(chunk) = stream.next().await {
                    total += chunk.expect("a chunk").len() as u64;
                }
                assert_eq!(total, size);
            });
        });
    });
}

fn dumped(path: &Path) -> (String, u64) {
    use sha2::Digest as _;
    let dump = std::process::Command::new("nix-store").arg("--dump").arg(path).output();
    let nar = dump.expect("nix-store; install nix-bin").stdout;
    let hash = sha2::Sha256::digest(&nar).iter().map(|byte| format!("{byte:02x}")).collect();
    (hash, nar.len() as u64)
}

fn load(root: &Path, database: &str) {
    use std::io::Write as _;
    let mut load = std::process::Command::new("nix-store");
    load.arg("--store").arg(root).arg("--load-db").stdin(std::process::Stdio::piped());
    let mut load = load.spawn().expect("nix-store");
    load.stdin.take().expect("a pipe").write_all(database.as_bytes()).expect("nix-store reads");
    assert!(load.wait().expect("nix-store ends").success());
}

fn streams(c: &mut Criterion) {
    stream(c, "one file of 256 MiB", |path| std::fs::write(path, vec![1; 256 << 20]).expect("a file"));
    stream(c, "20,000 files of a kilobyte", |path| {
        for folder in 0..200 {
            let folder = path.join(format!("d{folder}"));
            std::fs::create_dir_all(&folder).expect("a folder");
            for file in 0..100 {
                std::fs::write(folder.join(format!("f{file}")), vec![1; 1000]).expect("a file");
            }
        }
    });
    stream(c, "a tiny path", |path| {
        std::fs::write(path, "#!/bin/sh\n").expect("a file");
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a mode");
    });
}

criterion_group!(benches, formats, layouts, streams);
criterion_main!(benches);
