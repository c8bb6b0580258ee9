//! Signatures: what Nix signs verifies here, what we sign verifies there, and stored ones stand in front of ours.

use peernix::nix::narinfo::NarInfo;
use peernix::nix::{PublicKey, StoreDir};

use crate::narinfo::{field, narinfo};
use crate::support::daemon::Daemon;
use crate::support::http::get;
use crate::support::store::{Store, isolated};
use crate::support::{run, succeed, text};

/// A derivation, since texts are content-addressed and need no signature.
pub const BUILT: &str = r#"derivation {
  name = "built"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo built > $out" ]; }"#;

/// Makes a key with Nix; gives the secret file and the public key.
pub fn nix_key(store: &Store, name: &str) -> (std::path::PathBuf, String) {
    let (secret, public) =
        (store.root().join(format!("{name}.secret")), store.root().join(format!("{name}.public")));
    let mut generate = isolated("nix-store", store.root());
    succeed(generate.args(["--generate-binary-cache-key", name]).arg(&secret).arg(&public));
    (secret, std::fs::read_to_string(public).unwrap().trim().to_owned())
}

fn is_signed_by(narinfo: &str, key: &str) -> bool {
    let store_dir = StoreDir::default();
    let parsed = NarInfo::parse(narinfo.as_bytes(), &store_dir).unwrap();
    parsed.info.is_signed_by(&[PublicKey::parse(key).unwrap()], &store_dir).unwrap()
}

#[test]
fn stored_signatures_of_several_keys_come_first_and_all_verify() {
    let store = Store::new();
    let path = store.build(BUILT).remove(0);
    let keys = ["cache-a-1", "cache-b-1", "cache-c-1"].map(|name| nix_key(&store, name));
    for (secret, _) in &keys {
        succeed(store.nix("nix").args(["store", "sign", "--key-file"]).arg(secret).arg(&path));
    }
    let daemon = Daemon::serve(store.root(), "");
    let told = narinfo(&daemon, &path);
    let signatures = field(&told, "Sig").unwrap();
    let names: Vec<&str> = signatures.split(' ').map(|sig| sig.split(':').next().unwrap()).collect();
    assert_eq!(names[..3], ["cache-a-1", "cache-b-1", "cache-c-1"], "{told}");
    let ours = get(&daemon.url("public-key")).text().trim().to_owned();
    assert_eq!(names[3], ours.split(':').next().unwrap());
    assert_eq!(names.len(), 4);
    for key in keys.iter().map(|(_, public)| public).chain([&ours]) {
        assert!(is_signed_by(&told, key), "{key} in\n{told}");
    }
}

#[test]
fn what_we_sign_verifies_with_nix_and_a_changed_byte_does_not() {
    let store = Store::new();
    let path = store.build(BUILT).remove(0);
    // A key of Nix's own making, and one beside it for rotation.
    let ((old, old_public), (new, new_public)) = (nix_key(&store, "old-1"), nix_key(&store, "new-1"));
    let daemon = Daemon::serve(store.root(), &format!("[signing]\nkeys = [{old:?}, {new:?}]"));
    assert_eq!(get(&daemon.url("public-key")).text(), format!("{old_public}\n{new_public}\n"));
    let told = narinfo(&daemon, &path);

    // As a binary cache in a folder, which `nix store verify` checks by the narinfo's signatures.
    let cache = store.root().join("cache");
    let verify = |narinfo: &str, key: &str| {
        let _ = std::fs::remove_dir_all(&cache);
        std::fs::create_dir_all(cache.join("nar")).unwrap();
        std::fs::write(cache.join("nix-cache-info"), "StoreDir: /nix/store\n").unwrap();
        std::fs::write(cache.join(format!("{}.narinfo", &path[11..43])), narinfo).unwrap();
        let mut verify = isolated("nix", &store.root().join("verify-home"));
        let _ = std::fs::remove_dir_all(store.root().join("verify-home"));
        let from = format!("file://{}", cache.display());
        verify.args([
            "store",
            "verify",
            "--no-contents",
            "--store",
            &from,
            "--trusted-public-keys",
            key,
            &path,
        ]);
        run(&mut verify).status.success()
    };
    for key in [&old_public, &new_public] {
        assert!(verify(&told, key), "{key}");
    }
    let (_, stranger) = nix_key(&store, "stranger-1");
    assert!(!verify(&told, &stranger));
    let size = field(&told, "NarSize").unwrap();
    let hash = field(&told, "NarHash").unwrap();
    let other_hash = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
    let reference = path.trim_start_matches("/nix/store/");
    for (before, after) in [
        (format!("NarSize: {size}"), format!("NarSize: {size}0")),
        (format!("NarHash: {hash}"), format!("NarHash: {other_hash}")),
        ("References: ".to_owned(), format!("References: {reference}")),
    ] {
        let changed = told.replace(&before, &after);
        assert_ne!(changed, told);
        assert!(!verify(&changed, &old_public), "{after}");
        assert!(!is_signed_by(&changed, &old_public), "{after}");
    }
}

#[test]
fn keys_survive_a_restart_and_the_raw_key_of_peernix_in_go_loads() {
    let store = Store::new();
    let path = store.build(BUILT).remove(0);
    let raw = store.root().join("raw");
    std::fs::write(&raw, ed25519_dalek::SigningKey::from_bytes(&[3; 32]).to_keypair_bytes()).unwrap();
    let settings = format!("[signing]\nkeys = [{raw:?}]");
    let key = |daemon: &Daemon| get(&daemon.url("public-key")).text().trim().to_owned();
    let first = Daemon::serve(store.root(), &settings);
    let second = Daemon::serve(store.root(), &settings);
    assert_eq!(key(&first), key(&second));
    assert!(is_signed_by(&narinfo(&first, &path), &key(&second)));
    let host = text(std::process::Command::new("uname").arg("-n"));
    assert!(key(&first).starts_with(&format!("{host}-")), "{}", key(&first));
}
