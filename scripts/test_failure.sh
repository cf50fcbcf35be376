#!/usr/bin/env bash
# Kill each stage in the middle of a generation: the orchestrator must name it within 2 s and exit 1,
# the survivors must serve the next orchestrator. Usage: test_failure.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
stages=3
prepare_model
run_dir=$(mktemp -d)
trap 'stop_children; rm -rf "$run_dir"' EXIT
trap 'exit 130' INT TERM
base_port=$(free_base_port $((10 * stages + 2)))
pipeline-orch plan --model-dir "$model_dir" --stages $stages --base-port "$base_port" \
  -o "$run_dir/manifest.json" 2>/dev/null

start_stage() {
  stage-worker --manifest "$run_dir/manifest.json" --stage-idx "$1" --model-dir "$model_dir" --dev \
    >>"$run_dir/stage$1.log" 2>&1 &
  pids[$1]=$!
}
generate() {  # MAX_TOKENS
  pipeline-orch --manifest "$run_dir/manifest.json" --tokenizer "$model_dir/tokenizer.json" \
    --text "Once upon a time" --max-tokens "$1" --ignore-eos --dev
}
for ((i = 0; i < stages; i++)); do start_stage "$i"; done
generate 4 >/dev/null 2>&1 || die "the undisturbed run failed"

for ((victim = 0; victim < stages; victim++)); do
  generate 2000 >"$run_dir/text" 2>"$run_dir/err" &
  orchestrator=$!
  until [ "$(wc -c <"$run_dir/text")" -gt 60 ]; do sleep 0.05; done
  killed=$(date +%s%N)
  kill -KILL "${pids[victim]}"
  status=0
  wait "$orchestrator" || status=$?
  elapsed=$((($(date +%s%N) - killed) / 1000000))
  grep 'error:' "$run_dir/err" | sed 's/^/      /'
  [ "$status" = 1 ] || die "stage $victim killed: exit status $status, expected 1"
  grep -q "stage $victim is lost" "$run_dir/err" || die "stage $victim killed: not named"
  [ "$elapsed" -le 2000 ] || die "stage $victim killed: noticed after $elapsed ms, limit 2000"
  echo "ok    stage $victim killed: named, exit 1, after $elapsed ms"
  start_stage "$victim"
  generate 4 >/dev/null 2>"$run_dir/err" || { cat "$run_dir/err" >&2; die "survivors did not serve the next run"; }
  echo "ok    survivors served the next orchestrator"
done
