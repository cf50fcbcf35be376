#!/usr/bin/env bash
# Latency of 1, 2 and 3 encrypted stages beside one process, interleaved in one run.
# Usage: bench.sh [--rounds N] [--tokens N] [--threads N] [--stages 1,2,3]    MODEL=gpt2 chooses the model
#        bench.sh --compare [OPTION ...]    beside transformers, CTranslate2 and llama.cpp; --compare --help
#        bench.sh --load [OPTION ...]       seconds until weights are there, beside hashing them; --load --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case "${1-}" in
  -h|--help) sed -n 2,5p "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
  --compare)
    shift
    bash "$root/scripts/setup.sh" bench
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python "$root/scripts/bench_compare.py" "$@" ;;
  --load)
    shift
    bash "$root/scripts/setup.sh"
    exec python "$root/scripts/bench_load.py" "$@" ;;
esac
prepare_model
exec python "$root/scripts/bench.py" --model-dir "$model_dir" "$@"
