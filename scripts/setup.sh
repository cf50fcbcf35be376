#!/usr/bin/env bash
# Prepare .venv with veilpipe and the named extras. Idempotent: a second run costs milliseconds.
# Usage: scripts/setup.sh [EXTRA ...]        e.g. scripts/setup.sh download test
#
# Every package is a wheel whose SHA-256 scripts/locks names (scripts/lock.sh renews them).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${VEILPIPE_VENV:-$root/.venv}")

die() { echo "setup: error: $*" >&2; exit 2; }
trap 'exit 130' INT # or pip would seem to have failed
trap 'exit 143' TERM

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null &&
       "$candidate" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  die "needs Python 3.11 or newer; install it (Debian: apt-get install python3 python3-venv)"
}

make_venv() {
  local python
  python=$(find_python)
  rm -rf "$venv"
  "$python" -I -m venv "$venv" >/dev/null 2>&1 && return
  # Debian ships venv apart from Python; root can simply have it.
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    die "cannot create a virtual environment; run: apt-get install python3-venv"
  echo "setup: installing python3-venv" >&2
  { apt-get update && apt-get install -y --no-install-recommends python3-venv; } >/dev/null 2>&1 ||
    die "cannot install python3-venv; run: apt-get update && apt-get install python3-venv"
  rm -rf "$venv"
  "$python" -I -m venv "$venv" || die "cannot create a virtual environment in $venv"
}

has_compiler() {
  command -v "${CC:-cc}" >/dev/null && "$venv/bin/python" -I -c '
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())'
}

# The kernels in C are a third of the time per token, or less; everything runs without them.
want_compiler() {
  has_compiler && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing a C compiler for the fast kernels" >&2
    { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev; } >/dev/null 2>&1 || true
  fi
  has_compiler || echo "setup: no C compiler or no Python.h: veilpipe will run without its fast kernels" \
    "(Debian: apt-get install gcc python3-dev, then remove $venv/.veilpipe-base)" >&2
}

# Tests of stores start a Redis of their own; without one they are skipped.
want_redis() {
  command -v redis-server >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null && return
  echo "setup: installing redis-server for the tests of stores" >&2
  # Unpacked only: Debian would start one, which nobody here asked for.
  { apt-get update && RUNLEVEL=1 apt-get install -y --no-install-recommends redis-server; } >/dev/null 2>&1 || true
}

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9    # two scripts started together must not install over each other

[ -x "$venv/bin/python" ] && "$venv/bin/python" -I -c '' 2>/dev/null || make_venv

# Shows which package is being fetched, and keeps the rest quiet unless it fails.
log="$venv/install.log"
pip_install() { # PIP ARGUMENT...
  "$venv/bin/python" -I -m pip install --disable-pip-version-check --no-input --no-deps "$@" 2>&1 |
    tee "$log" | { grep --line-buffered -E '^(Collecting|Installing)' | cut -c1-100 >&2 || true; }
}

# The locks are complete, so pip need look for nothing; a wheel runs nothing while it is installed.
install_locked() { pip_install --require-hashes --only-binary :all: -r "$locks/$1.lock"; }

pip_failed() {
  tail -n 5 "$log" >&2
  die "pip failed; the full log is $log"
}

install_base() {
  want_compiler
  install_locked base || pip_failed
  # An index of this machine that has torch without CUDA is there to be used: it spares gigabytes.
  install_locked torch-cpu || { install_locked torch && install_locked cuda; } || pip_failed
  pip_install --no-build-isolation --editable "$root" || pip_failed
}

# One stamp per extra: the base package (its kernels are built here), and whatever else was asked for.
locks=$root/scripts/locks
for extra in base "$@"; do
  made_from=("$locks/$extra.lock")
  [ -f "${made_from[0]}" ] || die "there is no extra $extra"
  [ "$extra" = base ] && made_from+=("$locks"/{torch-cpu,torch,cuda}.lock "$root/pyproject.toml") &&
    mapfile -t -O ${#made_from[@]} made_from < <(find "$root/pipeline" "$root/transport" -name '*.[ch]' | sort)
  want=$(cat "${made_from[@]}" | sha256sum | cut -c1-16)
  stamp="$venv/.veilpipe-$extra"
  [ "$(cat "$stamp" 2>/dev/null || true)" = "$want" ] && continue
  echo "setup: installing veilpipe${extra:+ ($extra)}, a minute the first time" >&2
  [ "$extra" != test ] || want_redis
  if [ "$extra" = base ]; then install_base; else install_locked "$extra" || pip_failed; fi
  echo "$want" > "$stamp"
done

# Where Python may leave no bytecode behind (PYTHONDONTWRITEBYTECODE, another user's checkout), each start of
# each process would compile all of this again: a fifth of what it takes until a worker loads weights.
stamp="$venv/.veilpipe-bytecode"
if [ ! -f "$stamp" ] ||
   [ -n "$(find "$root/pipeline" "$root/transport" -name '*.py' -newer "$stamp" -print -quit)" ]; then
  "$venv/bin/python" -I -m compileall -qq "$root/pipeline" "$root/transport" || true
  touch "$stamp"
fi
