#!/usr/bin/env bash
# Fetch and build what enclave images are made of and booted with: the enclave kernel, the pinned
# packages of the base root file system and, to boot without AWS, QEMU's nitro-enclave machine (its
# security module able to sign under a test root) and vhost-device-vsock.
#
#   scripts/build_enclave_tools.sh [--check|--image-only|--container-only|--lock]
#
# --check       say what is missing and leave with 1 if anything is
# --image-only  only what images are made of, not what boots them: all that a build for AWS needs
# --container-only  only what container images are made of, which have no kernel
# --lock        pin the newest Debian packages and the wheels of constraints.txt, then stop
#
# Everything fetched is compared with a SHA-256 in enclave/recipes before it is used.
#
# Everything lands in $VEILPIPE_CACHE (~/.cache/veilpipe/enclave, or below $XDG_CACHE_HOME), for every
# checkout, and stays there until a recipe changes. Exit codes: 75 something cannot be had here, 1 all
# else.
# Needs Debian 12, about 6 GB of disk while it runs and ten minutes on two cores.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
recipes=$root/enclave/recipes
cache=${VEILPIPE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/veilpipe/enclave}
tools=$cache/tools
jobs=${VEILPIPE_JOBS:-$(nproc)}
mirror=${VEILPIPE_DEBIAN_MIRROR:-}
build_packages="bc bison dpkg-dev flex gcc libcbor-dev libelf-dev libfdt-dev libglib2.0-dev
  libgnutls28-dev libssl-dev make ninja-build patch pkg-config python3-venv xz-utils zlib1g-dev"
# shellcheck source=/dev/null
. "$recipes/tools.env"

say() { printf 'enclave-tools: %s\n' "$*"; }
die() { printf 'enclave-tools: %s\n' "$*" >&2; exit 1; }
# A mirror that moved or is out of reach says nothing about this project: callers may tell it apart.
cannot_fetch() { printf 'enclave-tools: %s\n' "$*" >&2; exit 75; }

# A tool is current when the stamp beside it names exactly what it was made from.
recipe_of() {
  case $1 in
    qemu) echo "$QEMU_SHA256 $FIRMWARE_SHA256 $MESON_SHA256 1"; cat "$recipes/qemu-nsm.patch" ;;
    kernel) echo "$LINUX_SHA256 1"; cat "$recipes/kernel.config" "$recipes/toolchain.lock" ;;
    vsock) echo "$VHOST_VSOCK_SHA256 1" ;;
    base) cat "$recipes/debian.lock" "$recipes/python.lock" ;;
    toolchain) cat "$recipes/toolchain.lock" ;;
  esac | sha256sum | cut -c1-64
}
is_current() { [ "$(cat "$tools/$1.stamp" 2>/dev/null)" = "$(recipe_of "$1")" ]; }
stamp() { recipe_of "$1" >"$tools/$1.stamp"; }

# The host of the system's own package source, so that a local mirror is used where there is one.
find_mirror() {
  [ -n "$mirror" ] && return
  mirror=$(sed -nE 's/^URIs: *(\S+debian)\/?$/\1/p; s/^deb (\[[^]]*\] )?(\S+debian)\/? .*/\2/p' \
    /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
    grep -v security | head -n 1 || true)
  [ -n "$mirror" ] || cannot_fetch "apt's sources name no Debian mirror; set VEILPIPE_DEBIAN_MIRROR"
}

# apt with sources and state of its own: the system's are neither read nor changed.
private_apt() {
  local tool=$1 options=(-o "Dir::State=$cache/apt/state" -o "Dir::Cache=$cache/apt/cache"
    -o "Dir::Etc::sourcelist=$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferencesparts=/dev/null -o APT::Sandbox::User=root -qq)
  shift
  "$tool" "${options[@]}" "$@"
}

prepare_apt() {
  [ -e "$cache/apt/ready" ] && return
  find_mirror
  say "reading package lists of $mirror"
  mkdir -p "$cache/apt/state/lists/partial" "$cache/apt/cache/archives/partial"
  cat >"$cache/apt/sources.list" <<LIST
deb $mirror bookworm main
deb ${mirror%/debian}/debian-security bookworm-security main
deb-src $mirror trixie main
deb-src ${mirror%/debian}/debian-security trixie-security main
deb $mirror sid main
LIST
  private_apt apt-get update || cannot_fetch "cannot read package lists from $mirror"
  touch "$cache/apt/ready"
}

# fetch deb|source NAME VERSION: into $cache/downloads, or fail naming what else there is.
fetch() {
  prepare_apt
  mkdir -p "$cache/downloads"
  local command=(download) listing=(madison "$2")
  [ "$1" = source ] && command=(source --download-only)
  (cd "$cache/downloads" && private_apt apt-get "${command[@]}" "$2=$3") ||
    { rm -f "$cache/apt/ready"
      cannot_fetch "cannot fetch $2 $3; there is: $(private_apt apt-cache "${listing[@]}" | awk '{print $3}' | sort -u | xargs). \
Set the version in $recipes/tools.env"; }
}

# The file a package version is kept in; apt writes an epoch's colon as %3a.
download_of() { echo "$cache/downloads/$1_${2//:/%3a}_$3.deb"; }

# check FILE SHA256: die unless the file, which apt has checked too, is the one that was pinned.
check() {
  local found
  found=$(sha256sum <"$1" | cut -c1-64)
  [ "$found" = "$2" ] && return
  rm -f "$1"
  die "${1##*/} has SHA-256 $found, pinned is ${2:-none}"
}

# fetch_deb NAME VERSION ARCHITECTURE SHA256: leave the pinned package in the downloads.
fetch_deb() {
  local file
  file=$(download_of "$1" "$2" "$3")
  [ -e "$file" ] || fetch deb "$1" "$2"
  check "$file" "$4"
}

unpack_deb() { # NAME VERSION ARCHITECTURE SHA256 DIRECTORY
  fetch_deb "${@:1:4}"
  dpkg-deb -x "$(download_of "$1" "$2" "$3")" "$5"
}

# fetch_locked LOCK DIRECTORY: the packages of a lock, and nothing else, into a directory.
fetch_locked() {
  local name version sha256
  rm -rf "$2" && mkdir -p "$2"
  while read -r name version sha256; do
    fetch_deb "$name" "$version" amd64 "$sha256"
    cp "$(download_of "$name" "$version" amd64)" "$2/"
  done < <(grep -v '^#' "$1")
}

install_build_packages() {
  local missing=() package
  for package in $build_packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  [ "$(id -u)" -eq 0 ] || cannot_fetch "missing build packages; run: sudo apt-get install ${missing[*]}"
  say "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    cannot_fetch "cannot install ${missing[*]}"
}

run_logged() { # LOG COMMAND...: quiet unless it fails
  local log=$1
  shift
  "$@" >"$log" 2>&1 || { tail -n 20 "$log" >&2; die "failed: $1 $2 (all of it in $log)"; }
}

build_qemu() {
  local build=$cache/build/qemu upstream=${QEMU_VERSION#*:}
  rm -rf "$build" && mkdir -p "$build"
  [ -e "$cache/downloads/qemu_$upstream.dsc" ] || fetch source qemu "$QEMU_VERSION"
  check "$cache/downloads/qemu_$upstream.dsc" "$QEMU_SHA256"  # names its archives' SHA-256
  say "building QEMU $upstream (about 5 minutes on 2 cores)"
  run_logged "$build/unpack.log" dpkg-source -x "$cache/downloads/qemu_$upstream.dsc" "$build/src"
  patch -s -d "$build/src" -p1 --fuzz=0 <"$recipes/qemu-nsm.patch" || die "the QEMU patch does not apply"
  printf 'CONFIG_%s=y\n' MICROVM NITRO_ENCLAVE VIRTIO_RNG VIRTIO_BLK >"$build/src/configs/devices/x86_64-softmmu/enclave.mak"
  python3 -I -m venv "$build/venv"
  echo "meson==$MESON_VERSION --hash=sha256:$MESON_SHA256" >"$build/meson.lock"
  "$build/venv/bin/pip" install -q --require-hashes -r "$build/meson.lock" >"$build/meson.log" 2>&1 ||
    cannot_fetch "cannot install meson $MESON_VERSION: $(tail -n 1 "$build/meson.log")"
  mkdir "$build/out" && cd "$build/out"
  PATH=$build/venv/bin:$PATH run_logged "$build/configure.log" ../src/configure \
    --python="$build/venv/bin/python" --target-list=x86_64-softmmu --without-default-features \
    --without-default-devices --with-devices-x86_64=enclave --enable-tcg --enable-kvm --enable-gnutls \
    --enable-libcbor --enable-vhost-user --enable-fdt=system --disable-tools --disable-docs \
    --disable-werror --disable-install-blobs --disable-debug-info
  run_logged "$build/build.log" nice -n 19 ninja -j"$jobs" qemu-system-x86_64
  mkdir -p "$tools/firmware"
  install -s qemu-system-x86_64 "$tools/qemu-nitro"
  unpack_deb qemu-system-data "$FIRMWARE_VERSION" all "$FIRMWARE_SHA256" "$build/data"
  cp "$build"/data/usr/share/qemu/{qboot.rom,linuxboot_dma.bin} "$tools/firmware/"
  cd "$root"
  "$tools/qemu-nitro" -M help | grep -q nitro-enclave || die "the QEMU just built has no nitro-enclave machine"
  rm -rf "$build"
}

# In a subshell: what it exports is for it alone.
build_kernel() (
  build=$cache/build/linux tree=$cache/build/linux/toolchain
  rm -rf "$build" && mkdir -p "$tree"
  unpack_deb linux-source-6.12 "$LINUX_VERSION" all "$LINUX_SHA256" "$build"
  for package in "$tools"/toolchain/*.deb; do dpkg-deb -x "$package" "$tree"; done
  say "building Linux $LINUX_VERSION (about 5 minutes on 2 cores)"
  tar -xf "$build"/usr/src/linux-source-6.12.tar.xz -C "$build"
  cd "$build/linux-source-6.12"
  # Who built it when and where would otherwise be part of the measured bytes.
  export KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 2026' KBUILD_BUILD_USER=veilpipe
  export KBUILD_BUILD_HOST=veilpipe KBUILD_BUILD_VERSION=1
  # So would the compiler's version.
  export PATH=$tree/usr/bin:$PATH LD_LIBRARY_PATH=$tree/usr/lib/x86_64-linux-gnu
  prefix=$tree/usr/bin/x86_64-linux-gnu-
  compiler=("CROSS_COMPILE=$prefix" "CC=${prefix}gcc-12")
  run_logged "$build/config.log" make "${compiler[@]}" KCONFIG_ALLCONFIG="$recipes/kernel.config" allnoconfig
  grep -E '^CONFIG_.*=[^n]' "$recipes/kernel.config" | while read -r line; do
    grep -qxF "$line" .config || die "Linux $LINUX_VERSION does not take $line"
  done
  run_logged "$build/build.log" nice -n 19 make "${compiler[@]}" -j"$jobs" bzImage
  cp arch/x86/boot/bzImage "$tools/vmlinuz"
  cd "$root"
  rm -rf "$build"
)

build_vsock() {
  local build=$cache/build/vsock
  rm -rf "$build" && mkdir -p "$build"
  unpack_deb vhost-device-vsock "$VHOST_VSOCK_VERSION" amd64 "$VHOST_VSOCK_SHA256" "$build"
  install "$build/usr/bin/vhost-device-vsock" "$tools/vhost-device-vsock"
  "$tools/vhost-device-vsock" --version >/dev/null || die "vhost-device-vsock $VHOST_VSOCK_VERSION does not run here"
  rm -rf "$build"
}

# Wheels for the Python inside the image, whatever Python runs here.
pip_download() {
  local python=$root/.venv/bin/python
  [ -x "$python" ] || python=python3
  "$python" -I -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
    --abi cp311 --abi abi3 --abi none --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}

build_toolchain() { fetch_locked "$recipes/toolchain.lock" "$tools/toolchain"; }

build_base() {
  fetch_locked "$recipes/debian.lock" "$tools/debs"
  rm -rf "$tools/wheels" && mkdir -p "$tools/wheels"
  pip_download --require-hashes -d "$tools/wheels" -r "$recipes/python.lock" >"$cache/wheels.log" 2>&1 ||
    cannot_fetch "cannot fetch the wheels of python.lock: $(tail -n 1 "$cache/wheels.log")"
}

# renew_lock LOCK: with the newest version in Debian 12 of each package it names.
renew_lock() {
  local name version file
  { grep '^#' "$1"
    grep -v '^#' "$1" | while read -r name _; do
      version=$(private_apt apt-cache madison "$name" | awk '$6 ~ /bookworm/ {print $3; exit}')
      file=$(download_of "$name" "$version" amd64)
      [ -e "$file" ] || fetch deb "$name" "$version"
      echo "$name $version $(sha256sum <"$file" | cut -c1-64)"
    done
  } >"$cache/renewed.lock"
  mv "$cache/renewed.lock" "$1"
}

write_locks() {
  local file
  rm -f "$cache/apt/ready" && prepare_apt
  mkdir -p "$cache/downloads"
  renew_lock "$recipes/debian.lock"
  renew_lock "$recipes/toolchain.lock"
  rm -rf "$cache/wheels" && mkdir "$cache/wheels"
  grep -v '^#' "$recipes/python.lock" | sed 's/==.*//' |
    run_logged "$cache/wheels.log" pip_download -c "$root/constraints.txt" -d "$cache/wheels" -r /dev/stdin
  { grep '^#' "$recipes/python.lock"
    for file in "$cache"/wheels/*.whl; do
      basename "$file" | awk -F- '{gsub(/_/, "-", $1); printf "%s==%s", $1, $2}'
      echo " --hash=sha256:$(sha256sum <"$file" | cut -c1-64)"
    done
  } >"$cache/python.lock"
  mv "$cache/python.lock" "$recipes/"
  rm -rf "$cache/wheels"
  say "wrote debian.lock, toolchain.lock and python.lock in $recipes"
}

wanted="base toolchain kernel vsock qemu"
case ${1:-} in
  '' | --check) ;;
  --image-only) wanted="base toolchain kernel" ;;
  --container-only) wanted="base toolchain" ;;
  --lock) write_locks && exit 0 ;;
  *) die "unknown option $1 (there are --check, --image-only, --container-only and --lock)" ;;
esac

mkdir -p "$tools"
exec 9>"$cache/lock"
flock 9 # two checkouts share this cache
stale=()
for tool in $wanted; do
  if is_current "$tool"; then say "$tool is cached"; else stale+=("$tool"); fi
done
if [ "${1:-}" = --check ]; then
  [ ${#stale[@]} -eq 0 ] || die "not built: ${stale[*]}"
  exit 0
fi
[ ${#stale[@]} -eq 0 ] || install_build_packages
for tool in "${stale[@]}"; do
  rm -f "$tools/$tool.stamp"
  started=$SECONDS
  "build_$tool"
  stamp "$tool"
  say "$tool built in $((SECONDS - started)) s"
done
say "ready in $tools"
