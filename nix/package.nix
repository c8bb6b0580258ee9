# The peernix package, for `callPackage`. Needs a rustc of at least the `rust-version` in Cargo.toml.
{
  lib,
  stdenv,
  rustPlatform,
  installShellFiles,
}:

let
  manifest = (lib.importTOML ../Cargo.toml).package;
in
rustPlatform.buildRustPackage {
  pname = manifest.name;
  inherit (manifest) version;

  # Only what the build reads, so that a change of a test or of the README does not rebuild the package.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../src
      ../config
      # cargo refuses a manifest that names a bench whose file is not there.
      (lib.fileset.maybeMissing ../benches)
    ];
  };

  cargoLock.lockFile = ../Cargo.lock;

  nativeBuildInputs = [ installShellFiles ];

  # The tests start real daemons, Nix stores and network namespaces, and need root for it; the build sandbox has none of
  # these. `tests/run.sh` runs them.
  doCheck = false;

  # Both are written by the program itself, so it must be able to run on the machine that builds.
  postInstall = lib.optionalString (stdenv.buildPlatform.canExecute stdenv.hostPlatform) ''
    installShellCompletion --cmd peernix \
      --bash <($out/bin/peernix completions bash) \
      --zsh <($out/bin/peernix completions zsh) \
      --fish <($out/bin/peernix completions fish)
    $out/bin/peernix man > peernix.1
    installManPage peernix.1
  '';

  meta = {
    inherit (manifest) description;
    license = lib.licenses.asl20;
    mainProgram = "peernix";
    platforms = lib.platforms.linux;
  };
}
