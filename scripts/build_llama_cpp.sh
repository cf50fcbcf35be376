#!/usr/bin/env bash
# Build llama.cpp for `bench.sh --compare`: the library, its RPC server, its own two benchmarks.
# Usage: build_llama_cpp.sh [--check]      --check: say whether it is there, and leave with 1 if not
#
# The source is the pinned copy inside PyPI's llama-cpp-python. Everything lands in
# $VEILPIPE_BENCH_CACHE (~/.cache/veilpipe/bench), never in the project. Needs cmake and a C++
# compiler; five minutes on two cores.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case "${1-}" in -h|--help) sed -n 2,7p "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;; esac

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
cache=${VEILPIPE_BENCH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/veilpipe/bench}
source_dir=$cache/llama.cpp
contender=$root/scripts/contenders/llama_cpp.cpp
stamp=$cache/llama.cpp.stamp
want="$version $(sha256sum "$contender" "${BASH_SOURCE[0]}" | cut -c1-64 | tr '\n' ' ')"

if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
  echo "llama.cpp is built in $cache" >&2
  exit 0
fi
[ "${1-}" != --check ] || { echo "llama.cpp is not built, or not from this recipe" >&2; exit 1; }
for tool in cmake g++; do
  command -v "$tool" >/dev/null || die "needs $tool (Debian: apt-get install cmake g++)"
done
mkdir -p "$cache"
rm -f "$stamp"

if [ "$(cat "$source_dir/.version" 2>/dev/null)" != "$version" ]; then
  bash "$root/scripts/setup.sh"
  echo "fetching llama-cpp-python $version" >&2
  echo "llama-cpp-python==$version --hash=sha256:$sha256" >"$cache/requirement.txt"
  python -I -m pip download -q --no-deps --no-binary llama-cpp-python --require-hashes \
    -d "$cache" -r "$cache/requirement.txt" || die "cannot fetch llama-cpp-python $version"
  rm -rf "$source_dir"
  mkdir "$source_dir"
  tar -xzf "$cache/llama_cpp_python-$version.tar.gz" -C "$source_dir" --strip-components=3 \
    "llama_cpp_python-$version/vendor/llama.cpp"
  echo "$version" >"$source_dir/.version"
fi

# As a user would build it for this very machine; everything else is llama.cpp's own choice.
cmake -S "$source_dir" -B "$source_dir/build" -DCMAKE_BUILD_TYPE=Release \
  -DGGML_NATIVE=ON -DGGML_RPC=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >"$cache/cmake.log" 2>&1 ||
  die "cmake failed: see $cache/cmake.log"
echo "building llama.cpp in $source_dir" >&2
nice -n 19 cmake --build "$source_dir/build" -j "$(nproc)" \
  --target llama ggml-rpc-server llama-bench llama-batched-bench >"$cache/build.log" 2>&1 ||
  die "the build failed: see $cache/build.log"
g++ -O3 -march=native -std=c++17 -Wall -I "$source_dir/include" -I "$source_dir/ggml/include" \
  "$contender" -L "$source_dir/build/bin" -lllama -lggml -lggml-base \
  -Wl,-rpath,"$source_dir/build/bin" -o "$cache/llama_cpp"
echo "$want" >"$stamp"
