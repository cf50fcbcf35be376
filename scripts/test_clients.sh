#!/usr/bin/env bash
# Released clients, each by its own package, against `pipeline-orch serve` over SmolLM2 on two stages.
# Python's are installed into build/clients/venv, those for Node.js into build/clients/node, if there is npm.
# Usage: test_clients.sh [PYTEST ARGUMENT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prepare_model
clients=$root/build/clients tests=$root/tests/clients

# install NAME FILE COMMAND ...: unless what FILE asks for has been installed before
install() {
  cmp -s "$2" "$clients/$1.installed" && return
  echo "test_clients: installing $1" >&2
  "${@:3}" >"$clients/$1.log" 2>&1 || { tail -5 "$clients/$1.log" >&2; die "cannot install $1"; }
  cp "$2" "$clients/$1.installed"
}
mkdir -p "$clients/node"
[ -x "$clients/venv/bin/python" ] || python -I -m venv "$clients/venv"
install python "$tests/requirements.txt" "$clients/venv/bin/pip" install -r "$tests/requirements.txt"
if command -v npm >/dev/null; then
  cp "$tests/package.json" "$clients/node"
  install node "$tests/package.json" npm install --prefix "$clients/node" --no-audit --no-fund
else
  echo "test_clients: no npm here: clients for Node.js are left out (Debian: apt-get install npm)" >&2
fi

run_dir=$(mktemp -d)
cleanup() { stop_children; rm -rf "$run_dir"; }
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
base_port=$(free_base_port 23)
key=$(python -I -c 'import secrets; print("sk-" + secrets.token_urlsafe(16))')
(umask 077 && echo "$key" >"$run_dir/keys")
pipeline-orch plan --model-dir "$model_dir" --model-name smollm2 --stages 2 --dtype int8 \
  --base-port "$base_port" -o "$run_dir/manifest.json" 2>"$run_dir/plan.log" ||
  { cat "$run_dir/plan.log" >&2; exit 2; }
pipeline-orch serve --manifest "$run_dir/manifest.json" --model-dir "$model_dir" --supervise --dev \
  --port $((base_port + 22)) --api-key-file "$run_dir/keys" 2>"$run_dir/serve.log" &
server=$!
url=http://127.0.0.1:$((base_port + 22))
until python -I -c 'import sys, httpx; sys.exit(not httpx.get(sys.argv[1] + "/readyz").is_success)' "$url" 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || { tail -5 "$run_dir/serve.log" >&2; die "the server has ended"; }
  sleep 0.5
done
status=0
VEILPIPE_URL=$url VEILPIPE_KEY=$key VEILPIPE_NODE=$clients/node \
  "$clients/venv/bin/python" -P -m pytest -c "$tests/clients.ini" "$tests" "$@" || status=$?
# Those that are commands ask servers that their tests start.
[ $# -gt 0 ] || python -P -m pytest "$root"/tests/e2e/test_{lm_eval,schemathesis}.py -m slow || status=$?
# What a client asked for and was refused.
grep -h 'level=ERROR\|event=defect' "$run_dir/serve.log" >&2 || true
exit "$status"
