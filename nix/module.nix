# NixOS module: `services.peernix.enable = true;` runs the daemon and makes the local Nix ask it.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) literalExpression mkDefault mkIf mkOption types;

  cfg = config.services.peernix;
  toml = pkgs.formats.toml { };

  # The daemon's own default, on all addresses (config/peernix.toml).
  defaultPort = 9999;
  # Peers of every version announce themselves here by default, whatever port their HTTP server has.
  announceUdpPort = cfg.settings.discovery.port or 9999;
  mdnsUdpPort = 5353;

  # "ADDRESS:PORT" each; null is the daemon's default: all addresses.
  listen = if cfg.settings.http.listen == null then [ ":${toString defaultPort}" ] else cfg.settings.http.listen;
  hostOf = address: lib.concatStringsSep ":" (lib.init (lib.splitString ":" address));
  portOf = address: lib.toInt (lib.last (lib.splitString ":" address));
  # Where the local Nix can ask: an address that includes 127.0.0.1.
  isLocal = address: lib.elem (hostOf address) [ "" "0.0.0.0" "[::]" "127.0.0.1" ];
  local = lib.filter isLocal listen;
  localPort = if local == [ ] then defaultPort else portOf (lib.head local);

  # null stands for "the daemon's default", and TOML has no null.
  configFile = toml.generate "peernix.toml" (
    lib.filterAttrsRecursive (_name: value: value != null) cfg.settings
  );

  # The [Service] section of the unit for other distributions, as an attribute set: the hardening is written down once.
  # A key that occurs several times becomes a list, as NixOS writes it.
  unit =
    let
      text = builtins.readFile ../config/peernix.service;
      section = lib.head (lib.splitString "\n[" (lib.last (lib.splitString "\n[Service]\n" text)));
      assignments = lib.concatMap (
        line:
        let
          pair = builtins.match "([A-Za-z]+)=(.*)" line;
        in
        lib.optional (pair != null) {
          name = lib.head pair;
          value = lib.last pair;
        }
      ) (lib.splitString "\n" section);
    in
    lib.mapAttrs (_key: values: if lib.length values == 1 then lib.head values else values) (
      lib.foldAttrs (value: rest: [ value ] ++ rest) [ ] (
        map (pair: { ${pair.name} = pair.value; }) assignments
      )
    );
in
{
  options.services.peernix = {
    enable = lib.mkEnableOption "peernix, a binary cache for Nix made of the machines on the LAN";

    package = mkOption {
      type = types.package;
      default = pkgs.peernix or (pkgs.callPackage ./package.nix { });
      defaultText = literalExpression "pkgs.peernix or (pkgs.callPackage ./package.nix { })";
      example = literalExpression "inputs.peernix.packages.\${pkgs.stdenv.hostPlatform.system}.default";
      description = "The peernix package to run.";
    };

    settings = mkOption {
      type = types.submodule {
        freeformType = toml.type;

        options.http.listen = mkOption {
          type = types.nullOr (types.listOf (types.strMatching ".*:[0-9]+"));
          default = null;
          example = [ "0.0.0.0:8080" ];
          description = ''
            Addresses and ports of the HTTP server, for the local Nix and for peers alike. `null` is the daemon's default:
            port ${toString defaultPort} on all addresses. {option}`services.peernix.addSubstituter` and
            {option}`services.peernix.openFirewall` follow the port.
          '';
        };

        options.signing.keys = mkOption {
          type = types.nullOr (types.listOf types.str);
          default = null;
          example = [ "/var/lib/peernix/secret.key" ];
          description = ''
            Files with secret keys that paths of this host are signed with. The daemon's own user must be able to read
            them; for files that only root can read use {option}`services.peernix.signingKeyFiles`, which sets this
            option. `null` is the daemon's default.
          '';
        };
      };
      default = { };
      example = {
        http.listen = [ "0.0.0.0:8080" ];
      };
      description = ''
        The configuration, written as TOML. Every key is optional; all are explained in {file}`config/peernix.toml` of
        peernix. The file is readable by everybody in the Nix store: put no secret into it.
      '';
    };

    signingKeyFiles = mkOption {
      type = types.listOf (types.strMatching "/.*");
      default = [ ];
      example = [ "/run/secrets/peernix-signing-key" ];
      description = ''
        Files with secret keys (`name:base64`, as `nix-store --generate-binary-cache-key` writes them) that paths of this
        host are signed with. They may be readable by root alone: systemd hands them over as credentials. Strings, since
        a path literal would be copied into the Nix store, where everybody can read it.
      '';
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = ''
        Whether to open the ports for peers on all interfaces: TCP of {option}`services.peernix.settings.http.listen`,
        UDP of {option}`services.peernix.settings.discovery.port` (announcements and questions of peers, 9999 by default)
        and UDP ${toString mdnsUdpPort} (mDNS).
        Without it this host is served by peers that it is told of, but serves and finds none. Whoever can reach the TCP
        port can read every path in the Nix store.
      '';
    };

    addSubstituter = mkOption {
      type = types.bool;
      default = true;
      example = false;
      description = ''
        Whether to make the local Nix ask peernix, by an entry in {option}`nix.settings.substituters`. Its place in that
        list does not matter: Nix sorts by the priority that a cache states, and peernix is asked before
        cache.nixos.org. No key is added to {option}`nix.settings.trusted-public-keys`: paths from public caches keep
        their signatures, and the keys of the LAN are yours to choose.
      '';
    };
  };

  config = mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.addSubstituter -> local != [ ];
        message = ''
          services.peernix.settings.http.listen = [ ${toString listen} ] does not include 127.0.0.1, where the local Nix would
          ask. Listen on all addresses, or set services.peernix.addSubstituter = false.
        '';
      }
    ];

    services.peernix.settings.signing.keys = mkIf (cfg.signingKeyFiles != [ ]) (
      lib.imap0 (index: _file: "/run/credentials/peernix.service/key-${toString index}") cfg.signingKeyFiles
    );

    nix.settings = {
      # Its place in the list says nothing: Nix sorts by priority.
      substituters = mkIf cfg.addSubstituter [ "http://127.0.0.1:${toString localPort}/nix-cache" ];
      # A host may have narrowed `allowed-users`; without access to the Nix daemon peernix serves nothing.
      extra-allowed-users = [ "peernix" ];
    };

    networking.firewall = mkIf cfg.openFirewall {
      allowedTCPPorts = lib.unique (map portOf listen);
      # 0 is a port of the system's choice, which nobody knows beforehand.
      allowedUDPPorts = lib.filter (port: port != 0) [
        announceUdpPort
        mdnsUdpPort
      ];
    };

    systemd.services.peernix = {
      description = "Binary cache for Nix made of the machines on the LAN";
      # For the reasons see config/peernix.service.
      after = [
        "network.target"
        "nix-daemon.socket"
      ];
      wants = [ "nix-daemon.socket" ];
      wantedBy = [ "multi-user.target" ];
      # The daemon asks `nix-store`, which must be the Nix of this host.
      path = [ config.nix.package ];
      serviceConfig = lib.mapAttrs (_key: mkDefault) unit // {
        ExecStart = "${lib.getExe cfg.package} --config ${configFile}";
        LoadCredential = lib.imap0 (index: file: "key-${toString index}:${file}") cfg.signingKeyFiles;
      };
    };
  };
}
