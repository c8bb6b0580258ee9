# Evaluates the files in nix/ with the stand-ins of this folder.
let
  lib = import ./lib.nix;
  pkgs = import ./pkgs.nix;

  isOption = value: value._type or null == "option";
  isProperty = value: builtins.elem (value._type or null) [ "if" "plain" ];

  # Definitions without their properties; what an `mkIf false` guards is gone.
  discharge =
    value:
    if builtins.isAttrs value && isProperty value then
      if value.condition or true then discharge value.content else null
    else if builtins.isAttrs value && !(value ? outPath) then
      let
        kept = builtins.filter (name: !absent value.${name}) (builtins.attrNames value);
      in
      builtins.listToAttrs (map (name: { inherit name; value = discharge value.${name}; }) kept)
    else
      value;
  absent = value: value._type or null == "if" && !value.condition;

  merge =
    left: right:
    left
    // builtins.mapAttrs (
      name: value:
      if builtins.isAttrs value && builtins.isAttrs (left.${name} or null) && !(value ? outPath) then
        merge left.${name} value
      else
        value
    ) right;

  # The value of an option, or of a tree of options, from its definitions; what was declared nowhere is kept as it is.
  apply =
    path: declared: defined:
    if isOption declared then
      let
        value = if defined == null then declared.default else defined;
      in
      if !(declared ? description && declared ? type && (declared ? default || declared ? example)) then
        throw "option ${path} lacks a description, a type, or a default or example"
      else if !(declared.type.check value) then
        throw "option ${path} is not of type ${declared.type.name}"
      else if declared.type ? options then
        apply path declared.type.options value
      else
        value
    else
      (if defined == null then { } else defined)
      // builtins.mapAttrs (name: option: apply "${path}.${name}" option (defined.${name} or null)) declared;

  evalModule =
    user:
    let
      values = apply "services.peernix" module.options.services.peernix definitions;
      module = import ../../nix/module.nix {
        inherit lib pkgs;
        config = {
          nix.package = "/stub/nix";
          services.peernix = values;
        };
      };
      # The only thing that the module defines for itself. `enable` is known without it, as in NixOS.
      own = discharge module.config.content.services.peernix.settings;
      definitions = user // { settings = merge own (user.settings or { }); };
      result = discharge module.config;
    in
    # All of the values, so that each is checked, used or not.
    builtins.deepSeq values (if result == null then null else builtins.removeAttrs result [ "services" ]);
in
{
  # What the module defines for other parts of NixOS, given `services.peernix`; null when it defines nothing.
  module = userJSON: evalModule (builtins.fromJSON userJSON);

  # A set of unit options as the lines of a unit file.
  unitLines =
    options:
    let
      line = key: value: "${key}=${toString value}\n";
      lines = key: if builtins.isList options.${key} then map (line key) options.${key} else [ (line key options.${key}) ];
    in
    builtins.concatStringsSep "" (builtins.concatMap lines (builtins.attrNames options));

  package =
    let
      package = pkgs.callPackage ../../nix/package.nix { };
    in
    builtins.removeAttrs package [ "outPath" ] // { cargoLock = toString package.cargoLock.lockFile; };

  flake =
    let
      flake = import ../../nix/flake.nix;
      outputs = flake.outputs {
        self = outputs;
        nixpkgs = {
          inherit lib;
          legacyPackages.x86_64-linux = pkgs;
          legacyPackages.aarch64-linux = pkgs;
        };
      };
    in
    {
      inherit (flake) description inputs;
      inherit (outputs) apps;
      outputs = builtins.attrNames outputs;
      packages = builtins.mapAttrs (_system: builtins.mapAttrs (_name: package: package.pname)) outputs.packages;
      overlay = (outputs.overlays.default pkgs { }).peernix.pname;
      # The stand-in evaluates the module under both names.
      nixosModules = builtins.mapAttrs (_name: toString) outputs.nixosModules;
    };
}
