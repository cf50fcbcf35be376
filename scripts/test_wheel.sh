#!/usr/bin/env bash
# Build the wheel, install it without extras into a fresh environment, and serve a model there, away
# from the checkout: what `pip install veilpipe` gives. Reports what it takes on disk.
# Usage: test_wheel.sh [DIRECTORY]      keeps the wheel there
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
limit_mb=200
work=$(mktemp -d)
source "$root/scripts/lib.sh"
trap 'stop_children; rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

die() { echo "test_wheel: error: $*" >&2; exit 1; }
say() { echo "test_wheel: $*" >&2; }
pip() { python -I -m pip --disable-pip-version-check --no-input -qq "$@"; }
size_kb() { du -sk --apparent-size "$work/env" | cut -f1; }

prepare_model
text="The capital of France is"
pip wheel --no-deps --no-build-isolation --wheel-dir "$work" "$root"
wheel=$(echo "$work"/veilpipe-*.whl)
[ $# -eq 0 ] || { mkdir -p "$1" && cp "$wheel" "$1"; }
python -I -m venv "$work/env"
empty=$(size_kb)
PATH="$work/env/bin:$PATH"
cd "$work"
pip install --constraint "$root/constraints.txt" "$wheel"
size=$((($(size_kb) - empty) / 1000))
say "the wheel has $(du -k "$wheel" | cut -f1) kB, installed with all it needs $size MB"
[ "$size" -le "$limit_mb" ] || die "$size MB are more than $limit_mb"
! python -I -c 'import torch' 2>/dev/null || die "torch came along"
python -I -c 'import pipeline, sys; sys.exit(not pipeline.__file__.startswith(sys.argv[1]))' "$work/env" ||
  die "the checkout was used, not what is installed"

version=$(python -I -c 'from importlib.metadata import version; print(version("veilpipe"))')
for command in stage-worker pipeline-orch pipeline-relay; do
  [ "$("$command" --version)" = "$command $version" ] || die "$command --version"
  "$command" --help >/dev/null || die "$command --help"
done

# A model by name, an example manifest, one that is planned, and its parts.
export XDG_DATA_HOME=$work/data XDG_STATE_HOME=$work/state
pipeline-orch pull "$model_dir" >/dev/null
name=$(basename "$model_dir")
port=$(free_base_port 22)
pipeline-orch plan --model-dir "$name" --stages 2 --base-port "$port" -o plan.json
pipeline-orch shard --manifest plan.json --model-dir "$name" --out shards

# run MANIFEST MODEL: what two stages make of the text.
run() {
  local i
  for i in 0 1; do
    stage-worker --manifest "$1" --stage-idx "$i" --model-dir "$2" --once --dev --quiet 2>"stage$i.log" &
  done
  pipeline-orch --manifest "$1" --tokenizer "$name" --text "$text" --max-tokens 8 --dev 2>orch.log ||
    { cat orch.log stage?.log >&2; die "no text came"; }
  stop_children
}
expected="$text Paris."
if ! python -I -c 'from pipeline.kernels.kernel_selection import why_not_native as why; import sys; sys.exit(bool(why()))'; then
  # No compiler, or another processor: then it has to say what to install.
  stage-worker --manifest plan.json --stage-idx 0 --model-dir "$name" --once --dev 2>stage0.log && die "computed by nothing"
  grep -q "pip install 'veilpipe\[torch\]'" stage0.log || { cat stage0.log >&2; die "no word of what to install"; }
  say "no native kernels here, which a stage says"
  exit 0
fi
# The example's ports may be somebody's here.
port=$(free_base_port 22)
sed "s/:90\([0-9][0-9]\)\"/:$((port / 100))\1\"/" "$root/manifests/smollm2_2stage.json" >example.json
for manifest in plan.json example.json; do
  [[ "$(run "$manifest" "$name")" == "$expected"* ]] || die "$manifest: another text than '$expected'"
done

served=$(free_base_port 1)
pipeline-orch serve --manifest shards/manifest.json --model-dir shards --supervise --dev --port "$served" 2>serve.log &
python -I - "$served" "$text" <<'PY' || { cat serve.log >&2; die "no answer was served"; }
import sys, time
import httpx

port, text = sys.argv[1:]
url = f"http://127.0.0.1:{port}"
for _ in range(600):
    try:
        if httpx.get(f"{url}/readyz").status_code == 200:
            break
    except httpx.TransportError:
        pass
    time.sleep(0.1)
body = {"model": "smollm2", "prompt": text, "max_tokens": 8, "temperature": 0}
body["model"] = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
sys.exit(not answer.startswith(" Paris."))
PY
pipeline-orch models remove "$name"
say "ready"
