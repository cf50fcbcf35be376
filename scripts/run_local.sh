#!/usr/bin/env bash
# Generate text with stage workers and an orchestrator as separate processes on this machine.
# Usage: run_local.sh [--mode plain|client] "PROMPT" [MAX_TOKENS]
# MODEL=gpt2 chooses the model, STAGES=3 the stages, THREADS=2 the threads of each stage. In mode
# client the orchestrator holds embedding and head, and computes them with as many threads.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage='usage: run_local.sh [--mode plain|client] "PROMPT" [MAX_TOKENS]'
mode=plain
if [ "${1-}" = --mode ]; then
  mode=${2-}
  shift $(($# < 2 ? $# : 2))
fi
case $mode in
  plain) split=stages own=() ;;
  client) split=client own=(--threads "${THREADS:-1}") ;;
  *) die "the mode is '$mode', expected plain or client; $usage" ;;
esac
prompt=${1-}
max_tokens=${2-50}
stages=${STAGES:-2}
[ $# -ge 1 ] && [ $# -le 2 ] || die "$usage"
[ -n "$prompt" ] || die "the prompt is empty; $usage"
[[ $max_tokens =~ ^[1-9][0-9]{0,6}$ ]] || die "MAX_TOKENS is '$max_tokens', expected a number from 1"
[[ $stages =~ ^[1-9][0-9]?$ ]] || die "STAGES is '$stages', expected a number from 1"

prepare_model
run_dir=$(mktemp -d)
cleanup() { stop_children; rm -rf "$run_dir"; }
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

base_port=$(free_base_port $((10 * stages + 2)))
pipeline-orch plan --model-dir "$model_dir" --stages "$stages" --base-port "$base_port" \
  --split "$split" -o "$run_dir/manifest.json" 2>"$run_dir/plan.log" || { cat "$run_dir/plan.log" >&2; exit 2; }

for ((i = 0; i < stages; i++)); do
  stage-worker --manifest "$run_dir/manifest.json" --stage-idx "$i" --model-dir "$model_dir" \
    --threads "${THREADS:-1}" --once --dev >"$run_dir/stage$i.log" 2>&1 &
  pids[i]=$!
done

# A worker that cannot start says why at once; do not let the orchestrator wait for it.
watch_workers() {
  local i
  while sleep 0.2; do
    for i in "${!pids[@]}"; do
      if ! kill -0 "${pids[i]}" 2>/dev/null && grep -q 'error:' "$run_dir/stage$i.log"; then
        grep 'error:' "$run_dir/stage$i.log" >&2
        kill -TERM "$1" 2>/dev/null || true
        return
      fi
    done
  done
}

pipeline-orch --manifest "$run_dir/manifest.json" --tokenizer "$model_dir/tokenizer.json" \
  --text "$prompt" --max-tokens "$max_tokens" --dev "${own[@]}" &
orchestrator=$!
watch_workers "$orchestrator" &
status=0
wait "$orchestrator" || status=$?
exit "$status"
