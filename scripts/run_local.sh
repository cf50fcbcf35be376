#!/usr/bin/env bash
# Generate text with stage workers and an orchestrator as separate processes on this machine. A worker
# that dies is replaced and the text goes on; with --exit-on-loss that ends it.
# Usage: run_local.sh [--exit-on-loss] [--mode MODE] "PROMPT" [MAX_TOKENS]
# MODE is plain, client, rotate, rotate-int8, dp, scx, scx-paper, offload or mix.
# MODEL=gpt2 chooses the model, STAGES=3 the stages, THREADS=2 the threads of each stage,
# BASE_PORT=9000 the first of their ports. In mode client the orchestrator holds embedding and head,
# and computes them with as many threads; in mode
# rotate rows are rotated by a secret as well, in rotate-int8 they also travel in 8 bits; in dp they
# get noise (DP_SIGMA, DP_CLIP), up to a bound (DP_EPSILON, DP_DELTA); in scx one stage, at home,
# asks a worker that holds its keys and values encoded, and is started anew if it dies, with noise of
# a scale (KV_NOISE), decoys (KV_DECOYS of them) and other keys at each step (ONE_TIME_KEYS=1) where
# that is asked for; in scx-paper
# stages between two at home (HOME_LAYERS of each, 1,1) keep theirs encoded; in offload and mix one
# at home has another worker compute its linears, which sees rows under one-time masks (MASKS of
# them, made first), or a prompt's rows mixed with each other. MODEL_DIR may be what
# `pipeline-orch shard` wrote: its manifest then says the stages and their addresses, and the mode; or a
# GGUF file.
# pipeline/codecs/README.md says what that protects, pipeline/scx/README.md what scx
# does, pipeline/offload/README.md what offload and mix do.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage='usage: run_local.sh [--exit-on-loss] [--mode MODE] "PROMPT" [MAX_TOKENS]'
modes='plain, client, rotate, rotate-int8, dp, scx, scx-paper, offload or mix'
mode=plain
own=(--threads "${THREADS:-1}")
while [[ ${1-} == --* ]]; do
  case $1 in
    --exit-on-loss) own+=(--exit-on-loss) ;;
    --mode)
      mode=${2-}
      shift $(($# < 2 ? 0 : 1))
      ;;
    *) break ;; # a prompt may begin like that
  esac
  shift
done
plan_flags=(--split client)
encoding=(${KV_NOISE:+--kv-noise "$KV_NOISE"} ${KV_DECOYS:+--kv-decoys "$KV_DECOYS"} ${ONE_TIME_KEYS:+--one-time-keys})
case $mode in
  plain) plan_flags=() ;;
  client | rotate) ;;
  rotate-int8) plan_flags+=(--wire-dtype I8) ;;
  dp)
    plan_flags+=(--dp-sigma "${DP_SIGMA:-0.03}" --dp-clip "${DP_CLIP:-7.5}")
    # Noise that leaves a text readable hides nothing; what it adds up to is printed.
    own+=(--dp-epsilon "${DP_EPSILON:-1e9}" --dp-delta "${DP_DELTA:-1e-5}")
    ;;
  scx) plan_flags=() STAGES=1 ;;
  # A worker that is started anew loads all weights.
  offload | mix) plan_flags=() own+=(--connect-timeout 120) STAGES=1 ;;
  scx-paper)
    plan_flags=(--home-layers "${HOME_LAYERS:-1,1}" "${encoding[@]}")
    STAGES=${STAGES:-3}
    ;;
  *) die "the mode is '$mode', expected $modes; $usage" ;;
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

text_dir=$model_dir
if [ -f "$model_dir/stage0/config.json" ]; then
  [[ $mode != scx* ]] || die "$model_dir holds shards; --mode $mode takes a whole model"
  manifest=$model_dir/manifest.json
  [ ! -d "$model_dir/client" ] || text_dir=$model_dir/client
  [ -d "$model_dir/client" ] || [ "$mode" = plain ] || die "$model_dir has no client part for --mode $mode"
  [ ! -d "$model_dir/client" ] || [ "$mode" != plain ] || die "$model_dir has a client part; give its --mode"
else
  base_port=${BASE_PORT:-$(free_base_port $((10 * stages + 3)))}
  part=127.0.0.1:$((base_port + 10 * stages + 2))
  case $mode in
    scx) plan_flags=(--attention "$part" "${encoding[@]}") ;;
    offload) plan_flags=(--linear "$part") ;;
    mix) plan_flags=(--mixed-linear "$part") ;;
  esac
  manifest=$run_dir/manifest.json
  pipeline-orch plan --model-dir "$model_dir" --stages "$stages" --base-port "$base_port" \
    "${plan_flags[@]}" -o "$manifest" 2>"$run_dir/plan.log" || { cat "$run_dir/plan.log" >&2; exit 2; }
  if [[ $mode == rotate* ]]; then
    pipeline-orch shard --manifest "$manifest" --model-dir "$model_dir" --out "$run_dir/shards" \
      --rotate-secret "$run_dir/secret" 2>"$run_dir/shard.log" || { cat "$run_dir/shard.log" >&2; exit 2; }
    manifest=$run_dir/shards/manifest.json
    model_dir=$run_dir/shards
  fi
fi
if [ "$mode" = offload ]; then
  own+=(--masks "$run_dir/masks")
  # A token of a prompt is a byte at least.
  num_masks=${MASKS:-$(($(printf %s "$prompt" | wc -c) + max_tokens + 1))}
  pipeline-orch masks make --manifest "$manifest" --model-dir "$model_dir" --tokens "$num_masks" \
    -o "$run_dir/masks" 2>"$run_dir/masks.log" || { cat "$run_dir/masks.log" >&2; exit 2; }
fi

# Whoever is asked for a part of the layers' work may go at any time: another begins with nothing.
: >"$run_dir/part.log"
keep_part_worker() {
  trap 'kill -TERM $(jobs -p) 2>/dev/null; exit 0' TERM # it may come before one has a name
  while :; do
    stage-worker "$@" --manifest "$manifest" --dev >>"$run_dir/part.log" 2>&1 &
    wait $! || true
    sleep 0.2
  done
}
case $mode in
  scx) keep_part_worker attention & ;;
  offload | mix) keep_part_worker linear --model-dir "$model_dir" --threads "${THREADS:-1}" & ;;
esac

# Its weights may take longer to load than a stage waits for it.
while [[ $mode == offload || $mode == mix ]] && ! grep -q event=listening "$run_dir/part.log"; do
  ! grep 'error:' "$run_dir/part.log" >&2 || exit 2
  sleep 0.2
done

tokenizer=$text_dir/tokenizer.json
[ -f "$tokenizer" ] || tokenizer=$text_dir # a GGUF file has its own
pipeline-orch --manifest "$manifest" --model-dir "$model_dir" --tokenizer "$tokenizer" \
  --supervise --text "$prompt" --max-tokens "$max_tokens" --dev "${own[@]}" &
orchestrator=$!
status=0
wait "$orchestrator" || status=$?
exit "$status"
