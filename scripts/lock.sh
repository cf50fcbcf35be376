#!/usr/bin/env bash
# Renew scripts/locks and constraints.txt after a change of dependencies in pyproject.toml.
#
#   scripts/lock.sh
#
# Versions in constraints.txt stay; what it lacks becomes the newest. To upgrade a package, change
# its line there, or remove it, and run this. Then scripts/build_enclave_tools.sh --lock.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh" lock
exec "${VEILPIPE_VENV:-$root/.venv}/bin/python" "$root/scripts/lock.py"
