#!/usr/bin/env bash
# The suites that take minutes: full parity with transformers, a million-input fuzz of every decoder,
# enclave images under QEMU, the page in a browser, released clients, stages placed by Slurm.
# Usage: test_slow.sh [parity] [fuzz] [enclave] [page] [clients] [slurm]     (default: all)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
[ $# -gt 0 ] || set -- parity fuzz enclave page clients slurm
for suite in "$@"; do
  echo "test_slow: $suite" >&2
  case $suite in
    parity) bash scripts/test.sh -m slow ;;
    fuzz)
      bash scripts/setup.sh fuzz
      python="${VEILPIPE_VENV:-$root/.venv}/bin/python"
      "$python" scripts/fuzz_transport.py --runs "${FUZZ_RUNS:-1000000}"
      "$python" scripts/fuzz_attestation.py --runs "${FUZZ_RUNS:-1000000}"
      "$python" scripts/fuzz_pipeline.py --runs "${FUZZ_RUNS:-1000000}" ;;
    enclave) bash scripts/test_enclave.sh ;;
    page) bash scripts/test_page.sh ;;
    clients) bash scripts/test_clients.sh ;;
    slurm) bash scripts/test_slurm.sh ;;
    *) echo "test_slow: error: no suite '$suite'; choose parity, fuzz, enclave, page, clients, slurm" >&2; exit 2 ;;
  esac
done
