#!/usr/bin/env bash
# Hide a message in text and read it again, from nothing: setup, model, plan, workers, round trip.
# Usage: run_stego.sh "MESSAGE" [--plot F.png]   PROMPT="..." what the text follows, CODEC=fimec,
#   TOP_K=0, MODEL=gpt2; written over two stages, read over STAGES=3. --plot draws each token's bits.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage='usage: run_stego.sh "MESSAGE" [--plot F.png]'
plot=
[ $# -eq 1 ] || { [ $# -eq 3 ] && [ "$2" = --plot ]; } || die "$usage"
[ -n "$1" ] || die "the message is empty; $usage"
[ $# -eq 1 ] || plot=$(realpath -m "$3")
stages=${STAGES:-3}
[[ $stages =~ ^[1-9][0-9]?$ ]] || die "STAGES is '$stages', expected a number from 1"

prepare_model
[ -z "$plot" ] || python -I -c 'import matplotlib' 2>/dev/null || die "--plot needs matplotlib: $venv/bin/pip install -c $root/constraints.txt matplotlib"
run_dir=$(mktemp -d)
trap 'rm -rf "$run_dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

plan() { # FILE STAGES: a manifest of this machine
  pipeline-orch plan --model-dir "$model_dir" --stages "$2" \
    --base-port "$(free_base_port $((10 * $2 + 2)))" -o "$1" 2>"$run_dir/plan.log" ||
    { cat "$run_dir/plan.log" >&2; exit 2; }
}
# quietly COMMAND...: of what it says on stderr, what it took or why it failed
quietly() {
  "$@" 2>"$run_dir/log" || { local code=$?; grep 'error:' "$run_dir/log" >&2; exit "$code"; }
  grep '^pipeline-orch stego:' "$run_dir/log" >&2
}
plan "$run_dir/written.json" 2
plan "$run_dir/read.json" "$stages"
common=(--model-dir "$model_dir" --secret-file "$run_dir/secret" --supervise --dev
  --prompt "${PROMPT:-The history of the old harbour town begins}")

quietly pipeline-orch stego keygen --out "$run_dir/secret" --manifest "$run_dir/written.json" \
  --model-dir "$model_dir" --codec "${CODEC:-range}" --top-k "${TOP_K:-50}"
printf %s "$1" >"$run_dir/message"
echo "writing over 2 stages ..." >&2
quietly pipeline-orch stego encode --manifest "$run_dir/written.json" "${common[@]}" \
  --in "$run_dir/message" --out "$run_dir/text" --stats-out "$run_dir/stats.json"
cat "$run_dir/text"; echo
echo "reading over $stages stages ..." >&2
quietly pipeline-orch stego decode --manifest "$run_dir/read.json" "${common[@]}" \
  --in "$run_dir/text" >"$run_dir/found"
cmp -s "$run_dir/message" "$run_dir/found" || die "what was read is not the message"
printf 'the message: '; cat "$run_dir/found"; echo
[ -z "$plot" ] || python -I "$root/scripts/plot_stego.py" "$run_dir/stats.json" "$plot"
