# The flake of peernix. It lies in a folder of its own: refer to it with `?dir=nix`, e.g. `github:OWNER/peernix?dir=nix`,
# or `git+file:///path/to/peernix?dir=nix` for a checkout. A `path:` to this folder alone does not work: the sources are
# one level up.
{
  description = "A binary cache for Nix made of the machines on your LAN";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      forEachSystem = lib.genAttrs [
        "x86_64-linux"
        "aarch64-linux"
      ];
    in
    {
      packages = forEachSystem (system: rec {
        peernix = nixpkgs.legacyPackages.${system}.callPackage ./package.nix { };
        default = peernix;
      });

      apps = forEachSystem (system: rec {
        peernix = {
          type = "app";
          program = lib.getExe self.packages.${system}.peernix;
          meta.description = "Run the peernix daemon or one of its commands";
        };
        default = peernix;
      });

      overlays.default = final: _prev: {
        peernix = final.callPackage ./package.nix { };
      };

      # Paths, not functions: a module that is imported under both names counts once.
      nixosModules = {
        peernix = ./module.nix;
        default = ./module.nix;
      };
    };
}
