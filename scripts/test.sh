#!/usr/bin/env bash
# All of the ordinary tests. Usage: test.sh [PYTEST ARGUMENT ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh" download test
export PATH="${VEILPIPE_VENV:-$root/.venv}/bin:$PATH"
[ -f "$root/models/smollm2/config.json" ] || bash "$root/scripts/download_model.sh" smollm2 >&2
cd "$root"
if [ $# -eq 0 ]; then
  bash scripts/check
  # A file's tests stay together: they share servers.
  set -- -m "not slow" -n 2 --dist loadfile
fi
exec python -P -m pytest "$@"
