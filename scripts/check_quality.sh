#!/usr/bin/env bash
# Does the pipeline still talk sense, and always the same sense? Usage: check_quality.sh
# GEMMA=FILE: of Gemma 3 270M in GGUF as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
failures=0

# expect NAME PATTERN TEXT
expect() {
  if grep -qE "$2" <<<"$3"; then echo "ok    $1"; else
    echo "FAIL  $1: expected /$2/ in: ${3:0:200}"; failures=$((failures + 1)); fi
}
generate() { STAGES=$1 bash "$root/scripts/run_local.sh" "$2" "$3" 2>/dev/null; }

expect "geography: France" "Paris" "$(generate 2 'The capital of France is' 12)"
expect "geography: Japan" "Tokyo" "$(generate 2 'The capital of Japan is' 12)"
expect "geography: Italy" "Rome" "$(generate 2 'The capital city of Italy is' 12)"
expect "continuation: days" "Thursday" "$(generate 2 'Monday, Tuesday, Wednesday,' 8)"
expect "continuation: numbers" "6, 7" "$(generate 2 '1, 2, 3, 4, 5,' 12)"

if [ -n "${GEMMA:-}" ]; then
  of_gemma() { MODEL_DIR=$GEMMA generate 2 "$@"; }
  expect "Gemma: days" "Thursday, Friday" "$(of_gemma 'Monday, Tuesday, Wednesday,' 8)"
  expect "Gemma: numbers" "6, 7" "$(of_gemma '1, 2, 3, 4, 5,' 12)"
  expect "Gemma: opposites" "cold" "$(of_gemma 'The opposite of hot is' 8)"
  expect "Gemma: the sun" "east" "$(of_gemma 'The sun rises in the' 6)"
fi

prompt="Once upon a time, a lighthouse keeper"
reference=$(generate 2 "$prompt" 40)
for stages in 1 2 3; do
  again=$(generate "$stages" "$prompt" 40)
  if [ "$again" = "$reference" ]; then echo "ok    determinism: $stages stages"; else
    echo "FAIL  determinism: $stages stages differ"; failures=$((failures + 1)); fi
done
if python "$root/scripts/quality.py" --tokens 1024 --check >/dev/null; then echo "ok    bfloat16, int8 and int4"; else
  echo "FAIL  bfloat16, int8 or int4: see scripts/quality.py"; failures=$((failures + 1)); fi
if python "$root/scripts/bench_wire.py" --rotated --check >/dev/null; then echo "ok    rotated int8"; else
  echo "FAIL  rotated int8: see scripts/bench_wire.py"; failures=$((failures + 1)); fi
[ "$failures" = 0 ] || { echo "$failures failed" >&2; exit 1; }
