#!/usr/bin/env bash
# Build the enclave image of every stage of a manifest and pin their measurements in it.
#
#   scripts/build_nitro.sh --manifest M --model-dir D [--out DIR] [--stages "0 1"] [--docker]
#                          [--signing-key KEY.pem --signing-certificate CERT.pem]
#
# Leaves DIR/stage0.eif, stage1.eif, … (default build/enclave); the manifest then names PCR0-2.
# Runs anywhere with Debian 12's package tools, no Docker and no enclave needed. With --docker the
# images are made by Docker and nitro-cli instead, on AWS's kernel; those are not reproducible.
set -euo pipefail

# shellcheck source=scripts/lib.sh
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }

manifest='' model_dir='' out=$root/build/enclave stages='' docker='' signing=()
while [ $# -gt 0 ]; do
  case $1 in
    --docker) docker=yes; shift; continue ;;
    -h | --help) usage 0 ;;
    --manifest | --model-dir | --out | --stages | --signing-key | --signing-certificate)
      [ $# -ge 2 ] || die "$1 needs a value" ;;
    *) die "unknown option $1" ;;
  esac
  case $1 in
    --manifest) manifest=$2 ;;
    --model-dir) model_dir=$2 ;;
    --out) out=$2 ;;
    --stages) stages=$2 ;;
    *) signing+=("$1" "$2") ;;
  esac
  shift 2
done
[ -f "$manifest" ] || die "--manifest ${manifest:-is missing}: no such file"
[ -d "$model_dir" ] || die "--model-dir ${model_dir:-is missing}: no such directory"

bash "$root/scripts/setup.sh" || exit $?
[ -n "$stages" ] || stages=$(python - "$manifest" <<'PY'
import json, sys
print(*(stage["stage_idx"] for stage in json.load(open(sys.argv[1]))["stages"]))
PY
) || die "cannot read the stages of $manifest"
mkdir -p "$out"

build_with_docker() { # STAGE
  local shard=$out/shard$1 image=veilpipe-stage:$1
  command -v docker >/dev/null || die "--docker needs docker"
  command -v nitro-cli >/dev/null || die "--docker needs nitro-cli"
  rm -rf "$shard"
  pipeline-orch shard --manifest "$manifest" --stage "$1" --model-dir "$model_dir" -o "$shard"
  docker build -f "$root/enclave/Dockerfile" --build-context "stage=$shard" -t "$image" "$root"
  nitro-cli build-enclave --docker-uri "$image" --output-file "$out/stage$1.eif" \
    "${signing[@]/--signing-key/--private-key}"
  python -m enclave pin "$out/stage$1.eif" --manifest "$manifest" --stage "$1"
  rm -rf "$shard"
}

cd "$root"
[ -n "$docker" ] || bash scripts/build_enclave_tools.sh --image-only
for stage in $stages; do
  echo "stage $stage -> $out/stage$stage.eif"
  if [ -n "$docker" ]; then
    build_with_docker "$stage"
  else
    python -m enclave build --manifest "$manifest" --stage "$stage" --model-dir "$model_dir" \
      --name "veilpipe-stage$stage" "${signing[@]}" -o "$out/stage$stage.eif"
  fi
done
