//! Bad input is told in one line that says what, where and what to do; nothing is left half done.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use crate::support::daemon::{Daemon, PROGRAM};
use crate::support::http::{get, get_with};
use crate::support::store::{Store, isolated};
use crate::support::{eventually, run, succeed, text};

/// Starts the program, which has to fail; gives what it said.
fn refused(arguments: &[&str], config: &str, folder: &Path) -> String {
    let file = folder.join("peernix.toml");
    std::fs::write(&file, config).unwrap();
    let output = run(Command::new("timeout").args(["20", PROGRAM, "--config"]).arg(&file).args(arguments));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("peernix: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    lines[0].to_owned()
}

#[test]
fn what_cannot_be_started_says_why_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let here = format!("[state]\ndirectory = {state:?}\n[http]\nlisten = [\"127.0.0.1:0\"]\n");
    let check = |said: String, parts: &[&str]| {
        for part in parts {
            assert!(said.contains(part), "{part:?} is not in {said:?}");
        }
        assert!(!state.exists(), "a state folder was left behind: {said}");
    };
    let with = |more: &str| refused(&[], &format!("{here}{more}"), folder.path());

    check(with("prioritty = 3\n"), &["peernix.toml:5: unknown field `prioritty`", "`priority`"]);
    check(with("drain_time = 5\n"), &["peernix.toml:5: http.drain_time: ", "\"30s\""]);
    check(with("allow = [\"10.0.0.1\"]\n"), &["peernix.toml:5: http.allow: ", "\"10.0.0.0/8\""]);
    check(
        with("[limits]\nheader_size = \"16 KiBB\"\n"),
        &["peernix.toml:6: limits.header_size: ", "\"16 KiB\""],
    );
    check(
        with("[store]\nroot = \"/nowhere/store\"\n"),
        &["peernix.toml: the store /nowhere/store does not exist: make it, or correct store.root"],
    );
    let twice = refused(&["check-config"], "[http]\nlisten = [\"[::]:1\", \"[::]:1\"]", folder.path());
    assert!(twice.contains("http.listen: names [::]:1 twice"), "{twice}");
    check(with("[store]\nlease = \"0s\"\n"), &["peernix.toml", "store.lease", "1s to 1day"]);
    check(with("[store]\nnix_store = \"\"\n"), &["peernix.toml:6: store.nix_store: is empty"]);
    check(with("[log]\nfilter = \"===\"\n"), &["peernix.toml:6: log.filter: "]);
    let said = with("[log]\nfilter = \"info,verbose\"\n");
    check(said, &["log.filter: \"verbose\" is none of off, error, warn, info, debug, trace"]);

    let key = folder.path().join("key");
    check(
        with(&format!("[signing]\nkeys = [{key:?}]\n")),
        &["peernix.toml: signing.keys: ", "/key can't be read: No such file"],
    );
    std::fs::write(&key, "no key at all").unwrap();
    check(with(&format!("[signing]\nkeys = [{key:?}]\n")), &["/key holds no secret key", "name:base64"]);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said = refused(&["--listen", &address], &here, folder.path());
    assert_eq!(said.matches("Address already in use").count(), 1, "{said}");
    check(said, &[&address, "can't be listened on", "another program has the port", "--listen"]);

    let output = run(Command::new(PROGRAM).args(["--listen", "localhost:9999"]));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("an address reads \"192.168.1.10:9999\""), "{said}");
    let output = run(Command::new(PROGRAM).arg("check-config").env("PEERNIX_LOG", "warning"));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("$PEERNIX_LOG: \"warning\" is none of off, error, warn,"), "{said}");

    let no_config = run(Command::new(PROGRAM).args(["--config", "/nowhere/peernix.toml"]));
    let said = String::from_utf8(no_config.stderr).unwrap();
    assert_eq!((no_config.status.code(), said.lines().count()), (Some(1), 1));
    assert!(said.contains("/nowhere/peernix.toml: can't be read"), "{said}");
}

#[test]
fn what_check_config_calls_good_is_what_serve_takes() {
    let store = Store::new();
    let folder = tempfile::tempdir().unwrap();
    for settings in [
        "[store]\nroot = \"/nowhere\"\n",
        "[store]\nroot = \"/proc/version\"\n",
        "[signing]\nkeys = [\"/nowhere\"]\n",
        "[log]\nfilter = \"verbose\"\n",
    ] {
        let said = refused(&["check-config"], settings, folder.path());
        assert_eq!(said, refused(&["serve"], settings, folder.path()));
    }
    let (file, key) = (folder.path().join("peernix.toml"), folder.path().join("key"));
    let check = |settings: &str| {
        std::fs::write(&file, settings).unwrap();
        let mut command = Command::new(PROGRAM);
        text(command.args(["check-config", "--config"]).arg(&file).env_remove("PEERNIX_LOG"))
    };
    let good = format!("{} is good", file.display());
    let root = format!("[store]\nroot = {:?}\n", store.root());
    let said = check(&root);
    assert!(said.starts_with(&good) && !said.contains("warning: "), "{said}");
    let said = check(&format!("{root}nix_store = \"/nowhere/nix-store\"\n"));
    assert!(
        said.starts_with(&good) && said.contains("\nwarning: /nowhere/nix-store was not found"),
        "{said}"
    );
    let said = check(&format!("[store]\nroot = {:?}\n", folder.path()));
    assert!(said.starts_with(&good) && said.contains("\nwarning: there is no store at "), "{said}");

    succeed(Command::new(PROGRAM).args(["key", "generate", "cache-1", "--to"]).arg(&key));
    let with_key = format!("{root}[signing]\nkeys = [{key:?}]\n");
    assert!(!check(&with_key).contains("warning: "));
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let said = check(&with_key);
    assert!(
        said.contains(&format!("warning: every user of this machine may read {}", key.display())),
        "{said}"
    );
    let daemon = Daemon::serve(store.root(), &format!("[signing]\nkeys = [{key:?}]\n"));
    let warned = daemon.logged("every user of this machine may read this secret key: chmod 600 it");
    assert_eq!(warned.len(), 1, "{:#?}", daemon.log());
}

#[test]
fn a_store_or_key_without_permission_is_told() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("peernix");
    std::fs::copy(PROGRAM, &program).unwrap();
    let root = folder.path().join("root");
    std::fs::create_dir_all(root.join("nix/store")).unwrap();
    std::fs::set_permissions(root.join("nix"), std::fs::Permissions::from_mode(0o700)).unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "secret").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let config = folder.path().join("peernix.toml");
    let as_nobody = |text: String| {
        std::fs::write(&config, format!("[http]\nlisten = [\"127.0.0.1:0\"]\n{text}")).unwrap();
        let mut command = Command::new("timeout");
        command.args(["20", "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        let output = run(command.arg(&program).arg("--config").arg(&config).env("HOME", folder.path()));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said.lines().last().unwrap().to_owned()
    };
    let said = as_nobody(format!("[store]\nroot = {root:?}\n"));
    assert!(
        said.contains("root/nix/store can't be read: Permission denied") && said.contains("store.root"),
        "{said}"
    );
    let said = as_nobody(format!("[signing]\nkeys = [{key:?}]\n"));
    assert!(said.contains("/key can't be read: Permission denied"), "{said}");
    // A folder for state that can't be made.
    std::fs::set_permissions(root.join("nix"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let said = as_nobody(format!("[store]\nroot = {root:?}\n"));
    assert!(said.contains("the state folder") && said.contains("state.directory"), "{said}");
}

#[test]
fn keys_are_made_as_nix_makes_them() {
    let store = Store::new();
    let file = store.root().join("made");
    let public = text(Command::new(PROGRAM).args(["key", "generate", "cache-1", "--to"]).arg(&file));
    assert!(public.starts_with("cache-1:"), "{public}");
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // Nix signs with it, and says the same public key.
    let mut convert = isolated("nix", store.root());
    let converted =
        convert.args(["key", "convert-secret-to-public"]).stdin(std::fs::File::open(&file).unwrap());
    assert_eq!(text(converted), public);
    let path = store.build(crate::signatures::BUILT).remove(0);
    succeed(store.nix("nix").args(["store", "sign", "--key-file"]).arg(&file).arg(&path));
    let mut verify = store.nix("nix");
    succeed(verify.args(["store", "verify", "--sigs-needed", "1", "--trusted-public-keys", &public, &path]));

    let again = run(Command::new(PROGRAM).args(["key", "generate", "cache-1", "--to"]).arg(&file));
    assert!(!again.status.success(), "a key was overwritten");
    let said = String::from_utf8(again.stderr).unwrap();
    assert!(said.lines().count() == 1 && said.contains("name another file"), "{said}");
    let spaced = run(Command::new(PROGRAM).args(["key", "generate", "a b"]));
    assert!(String::from_utf8(spaced.stderr).unwrap().contains("key name"));
    let piped = run(Command::new(PROGRAM).args(["key", "generate", "cache-2"]));
    assert!(piped.stdout.starts_with(b"cache-2:") && piped.stderr.starts_with(b"cache-2:"));

    let config = store.root().join("peernix.toml");
    std::fs::write(&config, format!("[signing]\nkeys = [{file:?}]\n")).unwrap();
    let said = text(Command::new(PROGRAM).args(["check-config", "--config"]).arg(&config));
    assert_eq!(said, format!("{} is good\nsigns as {public}", config.display()));
}

#[test]
fn the_key_in_the_state_folder_is_checked_too() {
    let folder = tempfile::tempdir().unwrap();
    let (file, key) = (folder.path().join("peernix.toml"), folder.path().join("secret-key"));
    std::fs::write(&file, format!("[state]\ndirectory = {:?}", folder.path())).unwrap();
    let check = || run(Command::new(PROGRAM).args(["check-config", "--config"]).arg(&file));
    let none = check();
    assert!(String::from_utf8_lossy(&none.stdout).contains("is made there at first start"), "{none:?}");
    let public = text(Command::new(PROGRAM).args(["key", "generate", "host-1", "--to"]).arg(&key));
    let good = check();
    assert!(String::from_utf8_lossy(&good.stdout).contains(&format!("signs as {public}")), "{good:?}");
    std::fs::write(&key, "garbage").unwrap();
    let damaged = check();
    assert_eq!(damaged.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&damaged.stderr).contains("secret-key holds no secret key"),
        "{damaged:?}"
    );
}

#[test]
fn daemons_with_one_state_folder_share_its_key_and_say_so() {
    let (store, folder) = (Store::new(), tempfile::tempdir().unwrap());
    let settings = format!("[state]\ndirectory = {:?}", folder.path());
    let daemons: Vec<Daemon> = std::thread::scope(|scope| {
        let all = [(); 4].map(|()| scope.spawn(|| Daemon::serve(store.root(), &settings)));
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let keys: Vec<String> = daemons.iter().map(|daemon| get(&daemon.url("public-key")).text()).collect();
    assert!(keys.iter().all(|key| key == &keys[0]), "{keys:?}");
    let count = |said: &str| daemons.iter().map(|daemon| daemon.logged(said).len()).sum::<usize>();
    assert_eq!(count("made a key to sign with"), 1);
    assert_eq!(count("another peernix has this state folder: name one for each by state.directory"), 3);
}

#[test]
fn help_completions_and_the_manual_are_printed() {
    for (arguments, part) in [
        (&["--help"][..], "http://127.0.0.1:9999/nix-cache"),
        (&["key", "generate", "--help"], "--to <FILE>"),
        (&["completions", "bash"], "_peernix"),
        (&["man"], ".TH peernix"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
    ] {
        let shown = text(Command::new(PROGRAM).args(arguments));
        assert!(shown.contains(part), "{arguments:?}: {shown}");
    }
    let page = text(Command::new(PROGRAM).arg("man"));
    assert!(page.contains("\npeernix check\\-config\n") && !page.contains("(1)"), "{page}");
    assert_eq!(run(Command::new(PROGRAM).arg("srve")).status.code(), Some(2));
}

#[test]
fn peers_that_cannot_be_shown_are_told_in_one_line() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "");
    let root = daemon.url("").trim_end_matches('/').to_owned();
    for (url, parts) in [
        (&*nobody, &["no daemon answers at", "Connection refused", "systemctl status peernix", "--url"][..]),
        ("nowhere", &["\"nowhere\" is no URL", "--url"]),
        (&format!("{root}/elsewhere"), &["says 404", "--url"]),
    ] {
        let output = run(Command::new(PROGRAM).args(["peers", "--url", url]));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} are not all in {said}");
        assert_eq!(said.matches(url).count(), 1, "{said}");
    }
    let shown = text(Command::new(PROGRAM).args(["peers", "--url", &root]));
    for part in ["UDP 9999", "TCP 9999", "discovery.targets"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
}

#[test]
fn the_peers_of_the_daemon_that_the_configuration_means_are_shown() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "[http]\nallow = [\"127.0.0.0/8\"]");
    let root = daemon.url("").trim_end_matches('/').to_owned();
    let address = root.trim_start_matches("http://");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("peernix.toml");
    let peers = |listen: &str| {
        std::fs::write(&file, format!("[http]\nlisten = [\"{listen}\"]")).unwrap();
        run(Command::new(PROGRAM).args(["peers", "--config"]).arg(&file))
    };
    let shown = peers(address);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("discovery.targets"), "{shown:?}");
    let shown = peers("10.0.0.1:9999");
    assert!(String::from_utf8_lossy(&shown.stderr).contains("no address on loopback"), "{shown:?}");
    let shown = run(Command::new(PROGRAM).args(["--listen", address, "peers", "--config"]).arg(&file));
    assert!(String::from_utf8_lossy(&shown.stdout).contains("discovery.targets"), "{shown:?}");
}

#[test]
fn whoever_shuts_out_its_own_nix_is_warned() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "[http]\nallow = [\"10.0.0.0/8\"]");
    let root = daemon.url("").trim_end_matches('/').to_owned();
    let output = run(Command::new(PROGRAM).args(["peers", "--url", &root]));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("does not answer this host: its http.allow"), "{said}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("peernix.toml");
    std::fs::write(&file, "[http]\nallow = [\"10.0.0.0/8\"]").unwrap();
    let said = text(Command::new(PROGRAM).args(["check-config", "--config"]).arg(&file));
    assert!(said.contains("is good, but:\nwarning: http.allow: does not have 127.0.0.1/32"), "{said}");
}

#[test]
fn a_store_that_is_not_there_is_no_good_health() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::serve(folder.path(), "");
    let health = || get(&daemon.url("health")).text();
    eventually("it is healthy", || health().contains("\"status\":\"ok\"").then_some(()));
    // nix-store has made it; somebody takes it away.
    std::fs::rename(folder.path().join("nix/store"), folder.path().join("nix/elsewhere")).unwrap();
    let said = health();
    assert!(said.contains("\"status\":\"degraded\"") && said.contains("does not exist"), "{said}");
    std::fs::rename(folder.path().join("nix/elsewhere"), folder.path().join("nix/store")).unwrap();
    assert!(health().contains("\"status\":\"ok\""), "{}", health());
}

#[test]
fn health_metrics_and_the_first_page_answer() {
    let store = Store::new();
    let daemon = Daemon::serve(store.root(), "");
    eventually("it is healthy", || {
        let health: serde_json::Value = serde_json::from_str(&get(&daemon.url("health")).text()).unwrap();
        assert_eq!(health["peers"], 0);
        (health["status"] == "ok" && health["store"] == "serving").then_some(())
    });
    let welcome = get(&daemon.url("nix-cache")).text();
    assert!(welcome.contains(&format!("extra-substituters = {}\n", daemon.substituter())), "{welcome}");
    assert!(welcome.contains(get(&daemon.url("public-key")).text().trim()), "{welcome}");
    let status: serde_json::Value = serde_json::from_str(&get(&daemon.url("api/v1/status")).text()).unwrap();
    assert_eq!(status["public_keys"], serde_json::json!([get(&daemon.url("public-key")).text().trim()]));
    let metrics = get(&daemon.url("metrics"));
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let modern =
        get_with(&daemon.url("metrics"), &[("accept", "application/openmetrics-text; version=1.0.0")]);
    assert!(modern.header("content-type").unwrap().starts_with("application/openmetrics-text"));
    assert!(modern.text().ends_with("# EOF\n"));
    let page = metrics.text();
    for name in [
        "peernix_http_requests_total{route=\"admin\",status=\"200\"}",
        "peernix_http_request_seconds_bucket",
        "peernix_http_response_bytes_total",
        "peernix_store_queries_total",
        "peernix_store_leases",
        "peernix_store_child_restarts_total",
        "peernix_build_info",
    ] {
        assert!(page.contains(name), "{name} is not in:\n{page}");
    }
    // The README names all of them, and no other.
    let shown = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let readme = include_str!("../../README.md").split('`').filter(|quoted| quoted.starts_with("peernix_"));
    let named = readme.filter_map(|quoted| quoted.split('{').next());
    assert_eq!(named.collect::<BTreeSet<_>>(), shown.collect::<BTreeSet<_>>());
    // The real reader of that page.
    use std::io::Write as _;
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("promtool; tests/run.sh installs prometheus");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let checked = promtool.wait_with_output().unwrap();
    assert_eq!(checked.status.code(), Some(0), "{}", String::from_utf8_lossy(&checked.stderr));
}
