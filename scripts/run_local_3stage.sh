#!/usr/bin/env bash
# run_local.sh with three stages. Usage: run_local_3stage.sh "PROMPT" [MAX_TOKENS]
STAGES=3 exec bash "$(dirname "${BASH_SOURCE[0]}")/run_local.sh" "$@"
