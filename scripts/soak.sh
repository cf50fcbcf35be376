#!/usr/bin/env bash
# Kill and stop stages 100 times under 8 live requests: every text must be the undisturbed one.
# Usage: soak.sh [--losses N] [--minutes M] [--requests N] [--pause SECONDS] ...; MODEL, MODEL_DIR as in the other scripts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prepare_model
python "$root/scripts/soak.py" --model-dir "$model_dir" --base-port "$(free_base_port 100)" "$@"
