//! The files for Nix and for systemd, read by the programs they are written for: `nix/` is evaluated by `nix-instantiate`
//! with the stand-ins for nixpkgs in `tests/nix/`, `config/peernix.service` is checked by `systemd-analyze`.
//!
//! A program that is missing fails the test. Nothing is built, and no Nix store is opened.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{fs, process};

/// The highest exposure that `systemd-analyze security` may find, in tenths.
const MAX_EXPOSURE_TENTHS: u32 = 15;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(repository().join(path)).expect(path)
}

fn run(command: &mut Command) -> Output {
    let program = command.get_program().to_string_lossy().into_owned();
    let hint = format!("{program} must be installed: tests/run.sh does it");
    command.output().expect(&hint)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Evaluates an expression in which the attributes of `tests/nix/eval.nix` are in scope.
fn instantiate(expression: &str) -> Output {
    let with_stubs = format!("with import ./tests/nix/eval.nix; {expression}");
    run(Command::new("nix-instantiate")
        .args(["--eval", "--strict", "--json", "--store", "dummy://"])
        .args(["-E", &with_stubs])
        .current_dir(repository()))
}

/// The value of an expression, as Nix prints it in JSON: without spaces, keys sorted.
fn eval(expression: &str) -> String {
    let output = instantiate(expression);
    assert!(output.status.success(), "{expression}: {}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// An attribute of what the module defines, given the options below `services.peernix` in JSON.
fn module(options: &str, attribute: &str) -> String {
    eval(&format!("(module ''{options}'').{attribute}"))
}

/// Keys of the `[Service]` section, each with its values in their order.
fn service_section(unit: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut options: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let lines = unit.lines().skip_while(|line| *line != "[Service]").skip(1);
    for line in lines.take_while(|line| !line.starts_with('[')) {
        if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
            options.entry(key).or_default().push(value);
        }
    }
    options
}

/// The unit with a program that exists on every machine in place of ours, in a folder that goes away with the value.
struct UnitFile(PathBuf);

impl UnitFile {
    fn new(test: &str, unit: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("peernix-{test}-{}", process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let unit = unit.replace("ExecStart=/usr/local/bin/peernix", "ExecStart=/bin/true");
        fs::write(folder.join("peernix.service"), unit).expect("a file in it");
        Self(folder)
    }

    fn analyze(&self, arguments: &[&str]) -> Output {
        run(Command::new("systemd-analyze").args(arguments).arg(self.0.join("peernix.service")))
    }
}

impl Drop for UnitFile {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn disabled_module_changes_nothing() {
    assert_eq!(eval("module ''{}''"), "null");
    assert_eq!(eval(r#"module ''{"openFirewall":true,"signingKeyFiles":["/k"]}''"#), "null");
}

#[test]
fn enabling_is_enough() {
    let on = r#"{"enable":true}"#;
    assert_eq!(module(on, "nix.settings.substituters"), r#"["http://127.0.0.1:9999/nix-cache"]"#);
    assert_eq!(module(on, "nix.settings.extra-allowed-users"), r#"["peernix"]"#);
    assert_eq!(module(on, "networking"), "{}", "the firewall stays as it is");
    let service = |attribute| module(on, &format!("systemd.services.peernix.{attribute}"));
    assert_eq!(service("wantedBy"), r#"["multi-user.target"]"#);
    assert_eq!(service("path"), r#"["/stub/nix"]"#, "nix-store of the Nix of this host");
    assert_eq!(service("serviceConfig.LoadCredential"), "[]");
    // The stand-in for the TOML generator names a file after what is in it.
    let exec_start =
        r#""/stub/peernix/bin/peernix --config /stub/peernix.toml?{\"http\":{},\"signing\":{}}""#;
    assert_eq!(service("serviceConfig.ExecStart"), exec_start);
}

#[test]
fn substituter_can_be_left_out() {
    assert_eq!(module(r#"{"enable":true,"addSubstituter":false}"#, "nix.settings ? substituters"), "false");
}

#[test]
fn port_follows_the_listen_address() {
    for (listen, port) in [("0.0.0.0:8080", 8080), ("[::]:81", 81), ("127.0.0.1:10000", 10000)] {
        let on = format!(
            r#"{{"enable":true,"openFirewall":true,"settings":{{"http":{{"listen":["{listen}"]}}}}}}"#
        );
        let substituter = format!(r#"["http://127.0.0.1:{port}/nix-cache"]"#);
        assert_eq!(module(&on, "nix.settings.substituters"), substituter, "{listen}");
        let firewall = format!(r#"{{"allowedTCPPorts":[{port}],"allowedUDPPorts":[9999,5353]}}"#);
        assert_eq!(module(&on, "networking.firewall"), firewall, "{listen}");
    }
    let two = r#"{"enable":true,"openFirewall":true,"settings":{"http":{"listen":["10.0.0.1:81","127.0.0.1:82"]}}}"#;
    assert_eq!(module(two, "nix.settings.substituters"), r#"["http://127.0.0.1:82/nix-cache"]"#);
    assert_eq!(module(two, "networking.firewall.allowedTCPPorts"), "[81,82]");
    let default = module(r#"{"enable":true,"openFirewall":true}"#, "networking.firewall.allowedTCPPorts");
    assert_eq!(default, "[9999]");
}

#[test]
fn the_firewall_follows_the_port_of_announcements() {
    for (port, open) in [("7777", "[7777,5353]"), ("0", "[5353]")] {
        let on =
            format!(r#"{{"enable":true,"openFirewall":true,"settings":{{"discovery":{{"port":{port}}}}}}}"#);
        assert_eq!(module(&on, "networking.firewall.allowedUDPPorts"), open);
    }
}

#[test]
fn listening_where_the_local_nix_does_not_ask_is_refused() {
    let holds = |listen: &str, add_substituter: bool| {
        let http = format!(r#"{{"listen":["{listen}"]}}"#);
        let on =
            format!(r#"{{"enable":true,"addSubstituter":{add_substituter},"settings":{{"http":{http}}}}}"#);
        module(&on, "assertions") // one of them, with its message
            .starts_with(r#"[{"assertion":true,"#)
    };
    for listen in ["0.0.0.0:9999", "[::]:9999", "127.0.0.1:9999"] {
        assert!(holds(listen, true), "{listen}");
    }
    for listen in ["192.168.1.2:9999", "[::1]:9999", "[fe80::1]:9999"] {
        assert!(!holds(listen, true), "{listen}");
        assert!(holds(listen, false), "{listen}");
    }
}

#[test]
fn settings_reach_the_configuration_file() {
    let on = r#"{"enable":true,"settings":{"limits":{"x":3},"peer":[{"address":"a"}]}}"#;
    let exec_start = module(on, "systemd.services.peernix.serviceConfig.ExecStart");
    let written = r#"?{\"http\":{},\"limits\":{\"x\":3},\"peer\":[{\"address\":\"a\"}],\"signing\":{}}""#;
    assert!(exec_start.ends_with(written), "{exec_start}");
}

#[test]
fn signing_keys_are_handed_over_as_credentials() {
    let on = r#"{"enable":true,"signingKeyFiles":["/run/secrets/a","/b"]}"#;
    let service = |attribute| module(on, &format!("systemd.services.peernix.serviceConfig.{attribute}"));
    assert_eq!(service("LoadCredential"), r#"["key-0:/run/secrets/a","key-1:/b"]"#);
    let directory = "/run/credentials/peernix.service";
    let written = format!(r#"\"keys\":[\"{directory}/key-0\",\"{directory}/key-1\"]"#);
    assert!(service("ExecStart").contains(&written), "{}", service("ExecStart"));
}

#[test]
fn wrong_options_are_errors() {
    for (options, message) in [
        (r#""signingKeyFiles":["key"]"#, "signingKeyFiles is not of type"),
        (r#""settings":{"http":{"listen":["9999"]}}"#, "http.listen is not of type"),
        (r#""openFirewall":"yes""#, "openFirewall is not of type"),
    ] {
        let output = instantiate(&format!(r#"module ''{{"enable":true,{options}}}''"#));
        assert!(!output.status.success(), "{options} was accepted");
        assert!(stderr(&output).contains(message), "{options}: {}", stderr(&output));
    }
}

#[test]
fn module_and_unit_file_agree() {
    let json = eval(r#"unitLines (module ''{"enable":true}'').systemd.services.peernix.serviceConfig"#);
    let lines = json.trim_matches('"').replace("\\n", "\n");
    let module_unit = format!("[Service]\n{lines}");
    let mut from_module = service_section(&module_unit);
    let unit = read("config/peernix.service");
    let mut from_unit = service_section(&unit);
    from_module.remove("ExecStart").expect("the module sets ExecStart");
    from_unit.remove("ExecStart").expect("the unit sets ExecStart");
    assert!(from_unit.len() > 30, "the section was not read: {from_unit:?}");
    assert_eq!(from_module, from_unit);
    // The order of the unit is the module's too.
    for attribute in ["after", "wants"] {
        let list = module(r#"{"enable":true}"#, &format!("systemd.services.peernix.{attribute}"));
        let names = list.trim_matches(['[', ']']).replace('"', "").replace(',', " ");
        let (first, rest) = attribute.split_at(1);
        let line = format!("\n{}{rest}={names}\n", first.to_uppercase());
        assert!(unit.contains(&line), "{line}");
    }
}

#[test]
fn package_builds_from_what_is_there() {
    let root = repository().to_string_lossy();
    let cargo = read("Cargo.toml");
    let version = cargo.lines().find_map(|line| line.strip_prefix("version = ")).expect("a version");
    assert_eq!(eval("[ package.pname package.version ]"), format!(r#"["peernix",{version}]"#));
    assert_eq!(eval("package.meta.mainProgram"), r#""peernix""#);
    assert_eq!(eval("package.meta.license.spdxId"), r#""Apache-2.0""#);
    assert_eq!(eval("package.src.root"), format!(r#""{root}""#));
    assert_eq!(eval("package.cargoLock"), format!(r#""{root}/Cargo.lock""#));
    let files = eval("package.src.files");
    assert!(files.starts_with(r#"["Cargo.toml","Cargo.lock","src","config""#), "{files}");
}

#[test]
fn flake_has_its_outputs() {
    assert_eq!(eval("flake.outputs"), r#"["apps","nixosModules","overlays","packages"]"#);
    let systems = r#"["aarch64-linux","x86_64-linux"]"#;
    assert_eq!(eval("builtins.attrNames flake.packages"), systems);
    assert_eq!(eval("builtins.attrNames flake.apps"), systems);
    assert_eq!(eval("flake.packages.aarch64-linux"), r#"{"default":"peernix","peernix":"peernix"}"#);
    assert_eq!(eval("flake.apps.x86_64-linux.default.program"), r#""/stub/peernix/bin/peernix""#);
    assert_eq!(eval("flake.overlay"), r#""peernix""#);
    let module = format!(r#""{}/nix/module.nix""#, repository().display());
    assert_eq!(eval("flake.nixosModules"), format!(r#"{{"default":{module},"peernix":{module}}}"#));
}

#[test]
fn systemd_accepts_the_unit() {
    let unit = read("config/peernix.service");
    let output = UnitFile::new("verify", &unit).analyze(&["verify"]);
    assert!(output.status.success(), "{}", stderr(&output));
    // Unknown keys and bad values change nothing but this.
    assert_eq!(stderr(&output), "");
    let misspelt = unit.replace("\nProtectHome=", "\nProtectHouse=");
    let output = UnitFile::new("misspelt", &misspelt).analyze(&["verify"]);
    assert!(stderr(&output).contains("ProtectHouse"), "{}", stderr(&output));
}

#[test]
fn the_unit_is_hardened() {
    let unit = read("config/peernix.service");
    let threshold = format!("--threshold={MAX_EXPOSURE_TENTHS}");
    let security = ["security", "--offline=true", "--no-pager", &threshold];
    let output = UnitFile::new("security", &unit).analyze(&security);
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
    let softer = unit.replace("\nPrivateUsers=", "\n#").replace("\nCapabilityBoundingSet=", "\n#");
    let output = UnitFile::new("softer", &softer).analyze(&security);
    assert!(!output.status.success(), "the threshold was not looked at");
}
