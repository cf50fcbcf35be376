#!/usr/bin/env bash
# Compile the kernels for arm64 and run them in an emulator. Says nothing of their speed.
# Usage: test_neon.sh [bits] [python]     (default: both)
#
#   bits    compare the bits of each kernel with those of AVX2 here
#   python  the self-test and the kernels' own tests, in Debian's Python for arm64
#
# Needs a cross compiler and qemu (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user); `bits` a
# processor with AVX2; `python` Debian's apt-get, PyPI and a quarter of an hour. What it fetches lies
# unpacked in build/arm64: nothing is installed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case "${1-}" in -h|--help) sed -n 2,11p "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac
[ $# -gt 0 ] || set -- bits python

cross=aarch64-linux-gnu-gcc
for tool in "$cross" qemu-aarch64 gcc; do
  command -v "$tool" >/dev/null ||
    die "needs $tool (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user gcc)"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
native=$root/pipeline/kernels/native arm=$root/build/arm64
flags=(-std=gnu11 -pthread -fno-math-errno -ffp-contract=off -fno-strict-aliasing)

compare_bits() {
  local file files=("$root/tests/pipeline/kernels/native/level_bits.c") strict=(-Wall -Wextra -Werror)
  for file in "$native"/*.c; do
    grep -Eq '"(calls|call_checks|program)\.h"|<Python\.h>' "$file" || files+=("$file") # those are Python's
  done
  gcc -O2 "${flags[@]}" "${strict[@]}" "${files[@]}" -lm -o "$work/here"
  "$work/here" avx2 >"$work/avx2"
  "$cross" -O3 -static "${flags[@]}" "${strict[@]}" "${files[@]}" -lm -o "$work/there"
  qemu-aarch64 -cpu max "$work/there" neon >"$work/neon"
  diff "$work/avx2" "$work/neon" >"$work/differing" ||
    die "NEON computes otherwise: $(grep -c '^>' "$work/differing") of $(wc -l <"$work/avx2") results, first $(sed -n 2p "$work/differing")"
  echo "NEON gives the bits of AVX2 in all $(wc -l <"$work/avx2") results"
}

# fetch_debian DIRECTORY PACKAGE...: Debian's packages for arm64 and all that they need, unpacked
# there, by lists of its own, so that this machine's stay as they are.
fetch_debian() {
  local to=$1 package
  shift
  mkdir -p "$to/apt/lists/partial" "$to/apt/cache/archives/partial" "$to/root"
  : >"$to/apt/status"
  local own=(-qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root
    -o Dir::State="$to/apt" -o Dir::State::status="$to/apt/status" -o Dir::Cache="$to/apt/cache")
  apt-get "${own[@]}" update
  apt-get "${own[@]}" install -y --no-install-recommends --download-only "$@" >/dev/null
  for package in "$to"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$to/root"; done
  rm -rf "$to/apt/lists"
  [ -e "$to/root/lib" ] || ln -s usr/lib "$to/root/lib" # as newer releases have it
}

# fetch_wheels DIRECTORY: what the kernels' tests import, in the versions of this environment; of
# torch one whose wheel for arm64 brings no GPU's libraries.
fetch_wheels() {
  "$venv/bin/python" -P -m pip freeze --exclude-editable | grep -iv '^torch==' >"$work/versions"
  "$venv/bin/python" -P -m pip install -q --disable-pip-version-check --no-deps --target "$1" -c "$work/versions" \
    --only-binary=:all: --implementation cp --python-version "$version" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    numpy torch==2.10.0 typing_extensions sympy mpmath networkx filelock jinja2 markupsafe fsspec \
    pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers
}

run_python() {
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || die "python: needs Debian's apt-get and dpkg-deb"
  [ -x "$venv/bin/python" ] || die "python: needs $venv: run scripts/setup.sh download test"
  if [ ! -f "$arm/done" ]; then
    rm -rf "$arm"
    fetch_debian "$arm" python3-minimal libpython3-stdlib libpython3-dev libstdc++6 libgomp1
  fi
  local python version tree=$work/tree include=$work/include name
  python=$(echo "$arm"/root/usr/bin/python3.*[0-9])
  version=${python##*/python}
  [ -f "$arm/done" ] || { fetch_wheels "$arm/site" && touch "$arm/done"; }

  mkdir -p "$tree" "$include/aarch64-linux-gnu" # not libc's headers: the compiler has its own
  ln -s "$arm/root/usr/include/python$version" "$include/python"
  ln -s "$arm/root/usr/include/aarch64-linux-gnu/python$version" "$include/aarch64-linux-gnu/"
  cp -r "$root/pipeline" "$root/transport" "$root/tests" "$tree"
  find "$tree" -name '*.so' -delete
  for name in pipeline/kernels transport; do
    "$cross" -O3 -shared -fPIC "${flags[@]}" -I"$include" -I"$include/python" "$root/$name"/native/*.c -lm \
      -o "$tree/$name/_native.cpython-${version/./}-aarch64-linux-gnu.so"
  done
  # The tests' own settings are for plugins that are not there.
  printf '%s\n' '[pytest]' 'addopts = -p no:cacheprovider --import-mode=importlib' 'pythonpath = .' \
    'filterwarnings = error' 'markers = slow: minutes of computing' >"$tree/pytest.ini"
  # What Python knows as itself, for the tests that start another.
  printf '%s\n' '#!/bin/sh' "exec qemu-aarch64 -L '$arm/root' -cpu max -0 \"\$0\" '$python' \"\$@\"" >"$work/python"
  chmod +x "$work/python"
  cd "$tree"
  # CI: nothing fails there for the time that it takes.
  there() { CI=1 PYTHONHOME=$arm/root/usr PYTHONPATH=$tree:$arm/site OMP_NUM_THREADS=1 "$work/python" "$@"; }
  there -c 'from pipeline.kernels import _native
from pipeline.kernels.kernel_selection import why_not_native
assert _native.levels() == ("neon",), _native.levels()
assert why_not_native("neon") is None, why_not_native("neon")
print("the self-test has nothing against NEON")'
  # All but a context of thousands, which takes as long there as all others; and what an emulated
  # process is none for: it has threads of the emulator's own, which does not survive a fork of them.
  there -m pytest -q --durations=5 --confcutdir=tests/pipeline/kernels/native \
    -k 'not long_context and not cpu_of_its_own and not forked_child' \
    tests/pipeline/kernels/native
}

for part in "$@"; do
  case $part in
    bits) compare_bits ;;
    python) run_python ;;
    *) die "no part '$part'; choose bits, python" ;;
  esac
done
