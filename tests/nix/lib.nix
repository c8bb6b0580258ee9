# Stand-in for the part of nixpkgs' `lib` that the files in nix/ use, with the same names and meanings. A function that
# is missing here was not known to be needed: check that nixpkgs has it before adding it.
let
  inherit (builtins)
    all
    attrNames
    concatMap
    elem
    elemAt
    filter
    foldl'
    genList
    head
    isAttrs
    isBool
    isList
    isString
    length
    listToAttrs
    mapAttrs
    match
    ;

  # A type here is a check alone; the module evaluator in eval.nix merges.
  mkType = name: check: { inherit name check; };
in
rec {
  inherit
    concatMap
    elem
    filter
    head
    length
    mapAttrs
    ;
  inherit (builtins) concatStringsSep;

  # Lists, strings, attribute sets.
  last = list: elemAt list (length list - 1);
  init = list: genList (elemAt list) (length list - 1);
  optional = condition: value: if condition then [ value ] else [ ];
  optionalString = condition: text: if condition then text else "";
  unique = foldl' (kept: item: if elem item kept then kept else kept ++ [ item ]) [ ];
  imap0 = f: list: genList (index: f index (elemAt list index)) (length list);
  genAttrs = names: f: listToAttrs (map (name: { inherit name; value = f name; }) names);
  splitString =
    separator: text:
    filter isString (builtins.split (builtins.replaceStrings [ "[" "." ] [ "\\[" "\\." ] separator) text);
  toInt = text: if match "[0-9]+" text != null then builtins.fromJSON text else throw "toInt: ${text}";
  foldr =
    op: nul: list:
    if list == [ ] then nul else op (head list) (foldr op nul (builtins.tail list));
  foldAttrs =
    op: nul:
    foldr (
      item: acc: foldl' (sum: key: sum // { ${key} = op item.${key} (sum.${key} or nul); }) acc (attrNames item)
    ) { };
  filterAttrsRecursive =
    keep: set:
    listToAttrs (
      concatMap (
        name:
        let
          value = set.${name};
        in
        optional (keep name value) {
          inherit name;
          value = if isAttrs value then filterAttrsRecursive keep value else value;
        }
      ) (attrNames set)
    );

  # Options and definitions. A definition with a property is discharged by eval.nix.
  mkOption = option: { _type = "option"; } // option;
  mkEnableOption = what: mkOption {
    type = types.bool;
    default = false;
    example = true;
    description = "Whether to enable ${what}.";
  };
  mkIf = condition: content: { _type = "if"; inherit condition content; };
  mkDefault = content: { _type = "plain"; inherit content; };
  literalExpression = text: { _type = "literalExpression"; inherit text; };

  types = {
    bool = mkType "bool" isBool;
    str = mkType "str" isString;
    package = mkType "package" (value: value ? outPath);
    strMatching = pattern: mkType "strMatching" (value: isString value && match pattern value != null);
    listOf = inner: mkType "listOf" (value: isList value && all inner.check value);
    nullOr = inner: mkType "nullOr" (value: value == null || inner.check value);
    submodule = module: mkType "submodule" isAttrs // { inherit (module) freeformType options; };
  };

  # Packages.
  importTOML = file: builtins.fromTOML (builtins.readFile file);
  getExe = package: "${package}/bin/${package.meta.mainProgram}";
  licenses.asl20.spdxId = "Apache-2.0";
  platforms.linux = [ "x86_64-linux" "aarch64-linux" ];
  fileset = {
    # Only names what is taken; a path that is missing is an error, as in nixpkgs.
    toSource =
      { root, fileset }:
      {
        root = toString root;
        files = map (file: if builtins.pathExists file then baseNameOf file else throw "no ${toString file}") fileset;
      };
    unions = builtins.foldl' (sum: item: sum ++ (if isList item then item else [ item ])) [ ];
    maybeMissing = path: if builtins.pathExists path then [ path ] else [ ];
  };
}
