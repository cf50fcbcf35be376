#!/usr/bin/env bash
# Compile the kernels for arm64, run them in an emulator, and compare their bits with those of AVX2
# here. Says nothing of their speed.
# Usage: test_neon.sh
#
# Needs a cross compiler and qemu (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user), and a
# processor with AVX2.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case "${1-}" in -h|--help) sed -n 2,7p "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac

cross=aarch64-linux-gnu-gcc
for tool in "$cross" qemu-aarch64 gcc; do
  command -v "$tool" >/dev/null ||
    die "needs $tool (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user gcc)"
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
native=$root/pipeline/kernels/native
files=("$root/tests/pipeline/kernels/native/level_bits.c")
for file in "$native"/*.c; do
  grep -Eq '"(calls|call_checks|program)\.h"|<Python\.h>' "$file" || files+=("$file") # those are Python's
done
flags=(-std=gnu11 -pthread -fno-math-errno -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Werror)

gcc -O2 "${flags[@]}" "${files[@]}" -lm -o "$work/here"
"$work/here" avx2 >"$work/avx2"
"$cross" -O3 -static "${flags[@]}" "${files[@]}" -lm -o "$work/there"
qemu-aarch64 -cpu max "$work/there" neon >"$work/neon"
diff "$work/avx2" "$work/neon" >"$work/differing" ||
  die "NEON computes otherwise: $(grep -c '^>' "$work/differing") of $(wc -l <"$work/avx2") results, first $(sed -n 2p "$work/differing")"
echo "NEON gives the bits of AVX2 in all $(wc -l <"$work/avx2") results"
