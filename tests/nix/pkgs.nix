# Stand-in for the part of nixpkgs that the files in nix/ use. Packages are attribute sets that show what they were made
# from; nothing is built.
let
  lib = import ./lib.nix;
  pkgs = {
    inherit lib;
    stdenv = {
      buildPlatform.canExecute = _host: true;
      hostPlatform.system = "x86_64-linux";
    };
    rustPlatform.buildRustPackage = arguments: arguments // { outPath = "/stub/${arguments.pname}"; };
    installShellFiles = "installShellFiles";
    formats.toml = _options: {
      type.name = "toml";
      generate = name: value: "/stub/${name}?${builtins.toJSON value}";
    };
    callPackage =
      file: overrides:
      let
        function = import file;
      in
      function (builtins.intersectAttrs (builtins.functionArgs function) pkgs // overrides);
  };
in
pkgs
