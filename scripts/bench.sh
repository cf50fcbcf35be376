#!/usr/bin/env bash
# Latency of 1, 2 and 3 encrypted stages beside one process, interleaved in one run.
# Usage: bench.sh [--rounds N] [--tokens N] [--threads N] [--stages 1,2,3]    MODEL=gpt2 chooses the model
#        bench.sh --compare [OPTION ...]    beside transformers, CTranslate2 and llama.cpp; --compare --help
#        bench.sh --modes [OPTION ...]      modes with an untrusted worker beside plain stages; --modes --help
#        bench.sh --load [OPTION ...]       seconds until weights are there, beside hashing them; --load --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case "${1-}" in
  -h|--help) sed -n 2,6p "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
  --compare)
    shift
    bash "$root/scripts/setup.sh" bench
    PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python "$root/scripts/bench_compare.py" "$@" ;;
  --load)
    shift
    bash "$root/scripts/setup.sh"
    exec python "$root/scripts/bench_load.py" "$@" ;;
esac
script=bench.py
if [ "${1-}" = --modes ]; then
  shift
  script=bench_modes.py
fi
prepare_model
exec python "$root/scripts/$script" --model-dir "$model_dir" "$@"
