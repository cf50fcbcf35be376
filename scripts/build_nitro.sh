#!/usr/bin/env bash
# Build the enclave image of every stage of a manifest and pin their measurements.
#
#   scripts/build_nitro.sh --manifest M --model-dir D [--out DIR]
#   scripts/build_nitro.sh --shards S [--out DIR]
#
#   [--docker] [--signing-key KEY.pem --signing-certificate CERT.pem] go with both.
#
# Leaves DIR/stage0.eif, stage1.eif, … and DIR/manifest.json, which pins them (default
# build/enclave). M comes from `pipeline-orch plan --vsock`, S from `pipeline-orch shard`, which the
# first form runs itself. Runs anywhere with Debian 12's package tools, no Docker and no enclave
# needed. With --docker the images are made by Docker and nitro-cli instead, on AWS's kernel; those
# are not reproducible.
set -euo pipefail

# shellcheck source=scripts/lib.sh
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }

manifest='' model_dir='' shards='' out=$root/build/enclave docker='' signing=()
while [ $# -gt 0 ]; do
  case $1 in
    --docker) docker=yes; shift; continue ;;
    -h | --help) usage 0 ;;
    --manifest | --model-dir | --shards | --out | --signing-key | --signing-certificate)
      [ $# -ge 2 ] || die "$1 needs a value" ;;
    *) die "unknown option $1" ;;
  esac
  case $1 in
    --manifest) manifest=$2 ;;
    --model-dir) model_dir=$2 ;;
    --shards) shards=$2 ;;
    --out) out=$2 ;;
    *) signing+=("$1" "$2") ;;
  esac
  shift 2
done
if [ -n "$shards" ]; then
  [ -z "$manifest$model_dir" ] || die "--shards goes without --manifest and --model-dir"
  [ -f "$shards/manifest.json" ] || die "--shards $shards holds no manifest.json; pipeline-orch shard writes it"
else
  [ -f "$manifest" ] || die "--manifest ${manifest:-is missing}: no such file"
  [ -d "$model_dir" ] || die "--model-dir ${model_dir:-is missing}: no such directory"
fi
if [ -n "$docker" ]; then
  command -v docker >/dev/null || die "--docker needs docker"
  command -v nitro-cli >/dev/null || die "--docker needs nitro-cli"
fi

bash "$root/scripts/setup.sh" || exit $?
stages=$(python -I - "${manifest:-$shards/manifest.json}" <<'PY'
import sys
from pathlib import Path
from pipeline.errors import InputError
from pipeline.agreement.manifest import load_manifest

try:
    manifest = load_manifest(Path(sys.argv[1]))
except InputError as error:
    sys.exit(f"build_nitro.sh: error: {error}")
if not manifest.orchestrator_keys:
    sys.exit("build_nitro.sh: error: the manifest lists no orchestrator_keys, so nobody could use "
             "these images; plan it with --orchestrator-key (pipeline-orch keygen prints one)")
print(*(stage.stage_idx for stage in manifest.stages))
PY
) || exit 2
mkdir -p "$out"
if [ -z "$shards" ]; then
  work=$(mktemp -d "$out/.shards.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  shards=$work/shards
  pipeline-orch shard --manifest "$manifest" --model-dir "$model_dir" -o "$shards"
fi

build_with_docker() { # STAGE
  local image=veilpipe-stage:$1
  docker build -f "$root/enclave/Dockerfile" --build-context "stage=$shards/stage$1" -t "$image" "$root"
  nitro-cli build-enclave --docker-uri "$image" --output-file "$out/stage$1.eif" \
    "${signing[@]/--signing-key/--private-key}"
}

[ -n "$docker" ] || bash "$root/scripts/build_enclave_tools.sh" --image-only
cp "$shards/manifest.json" "$out/.manifest.json"
for stage in $stages; do
  echo "stage $stage -> $out/stage$stage.eif"
  if [ -n "$docker" ]; then
    build_with_docker "$stage"
  else
    python -I -m enclave build --stage-dir "$shards/stage$stage" --name "veilpipe-stage$stage" \
      "${signing[@]}" -o "$out/stage$stage.eif"
  fi
  python -I -m enclave pin "$out/stage$stage.eif" --manifest "$out/.manifest.json" --stage "$stage" >/dev/null
done
mv "$out/.manifest.json" "$out/manifest.json"
echo "pinned in $out/manifest.json"
