#!/usr/bin/env bash
# Boot enclave images here, without AWS: look at one from outside and inside, generate text over two
# stages behind the relay, and see altered ones refused.
#
#   scripts/test_enclave.sh [pytest arguments]
#
# Builds what it needs first (ten minutes once, then seconds; see scripts/build_enclave_tools.sh).
# Needs 8 GB of memory and 4 GB below $TMPDIR. Exit codes: 75 something could not be downloaded,
# else pytest's.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
export VEILPIPE_CACHE=${VEILPIPE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/veilpipe/enclave}
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || { echo "test_enclave: no $python: run scripts/setup.sh first" >&2; exit 1; }

"$root/scripts/build_enclave_tools.sh"

work=$(mktemp -d "${TMPDIR:-/tmp}/veilpipe-boot.XXXXXX")
child=
cleanup() {
  [ -z "$child" ] || kill "$child" 2>/dev/null || true
  wait
  if [ "${status:-1}" -ne 0 ]; then
    for log in "$work"/*.log; do [ -e "$log" ] && { echo "--- ${log##*/}"; tail -n 15 "$log"; }; done >&2
  fi
  rm -rf "$work"
}
trap cleanup EXIT

mkdir "$work/stage"
cp "$root/tests/enclave/guest/probe.py" "$work/stage/"
echo '{"argv": ["/usr/bin/python3", "-IB", "/stage/probe.py"]}' >"$work/stage/run.json"
cd "$root"
"$python" tests/enclave/make_test_authority.py "$work/authority"
"$python" -P -m enclave build --without-wheels --name boot-test --stage-dir "$work/stage" \
  --signing-key "$work/authority/key.pem" --signing-certificate "$work/authority/leaf.pem" \
  -o "$work/probe.eif"

VEILPIPE_BOOT_TEST=$work "$python" -P -m pytest -q tests/enclave/test_{boot*,native}.py "$@" &
child=$!
status=0
wait "$child" || status=$?
child=
exit "$status"
