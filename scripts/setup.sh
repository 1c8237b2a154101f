#!/usr/bin/env bash
# Makes sure that what a make target needs is there. Usage: setup.sh [build] [test]
# On Debian and as root (or with passwordless sudo) what is missing is installed; otherwise it is
# named, with the command that installs it.
set -euo pipefail
cd "$(dirname "$0")/.."

install() { # packages that are missing
  local sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  if command -v apt-get >/dev/null && { [ -z "$sudo" ] || sudo -n true 2>/dev/null; }; then
    echo "installing: $*"
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$@" >/dev/null
  else
    echo "missing: $*. Install with:  sudo apt-get install $*" >&2
    exit 1
  fi
}

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v make >/dev/null || missing+=(make)
if ! command -v initdb >/dev/null && ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; then
  missing+=(postgresql)
fi
for what in "$@"; do
  if [ "$what" = test ]; then
    command -v npm >/dev/null || missing+=(npm)
    command -v openssl >/dev/null || missing+=(openssl)
  fi
done
[ ${#missing[@]} = 0 ] || install "${missing[@]}"

if ! command -v cargo >/dev/null; then
  echo "missing: Rust. Install it with rustup (https://rustup.rs), then open a new shell." >&2
  exit 1
fi

for what in "$@"; do
  if [ "$what" = test ]; then
    command -v cargo-nextest >/dev/null || cargo install --locked cargo-nextest
    # The real client, and the Node that it runs on; the lock file pins both.
    if [ ! -x tests/client/node_modules/node/bin/node ] ||
       ! cmp -s tests/client/package-lock.json tests/client/node_modules/.zeroring-lock; then
      (cd tests/client && npm ci --no-fund --no-audit --loglevel=error)
      cp tests/client/package-lock.json tests/client/node_modules/.zeroring-lock
    fi
  fi
done
