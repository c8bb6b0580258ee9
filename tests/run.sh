#!/bin/sh
# Installs what the tests need and runs them all. As root on Debian: the tests make namespaces and mount over /nix.
set -eu
cd "$(dirname "$0")/.."

if [ "$(id -u)" -ne 0 ]; then
    echo "tests/run.sh: run me as root: the tests make network, mount and process namespaces" >&2
    exit 1
fi

# nix-bin: Nix itself. systemd: systemd-analyze, for the unit. prometheus: promtool, for /metrics.
packages="nix-bin systemd prometheus iproute2 nftables procps util-linux curl python3 build-essential"
missing=""
for package in $packages; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086 # a list
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --locked --no-fail-fast "$@"
    # nextest runs no examples in the documentation.
    cargo test --locked --doc
else
    cargo test --locked --no-fail-fast "$@"
fi
