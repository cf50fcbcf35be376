#!/usr/bin/env bash
# The page of `pipeline-orch serve` in a headless Chromium, over SmolLM2 on two stages: a chat, a stop,
# a stage that is killed in mid-sentence, a phone, a keyboard. Screenshots go to build/page.
# Usage: test_page.sh [PYTEST ARGUMENT ...]; CHROMIUM names the browser, if it is not called chromium.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
browser=${CHROMIUM:-chromium}
if ! command -v "$browser" >/dev/null; then
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    { echo "test_page: error: no $browser here; run: apt-get install chromium" >&2; exit 2; }
  echo "test_page: installing chromium" >&2
  { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
    { echo "test_page: error: cannot install chromium" >&2; exit 75; }
fi
CHROMIUM=$(command -v "$browser")
export CHROMIUM
bash "$root/scripts/setup.sh" browser test
[ -f "$root/models/smollm2/config.json" ] || bash "$root/scripts/download_model.sh" smollm2 >&2
cd "$root"
exec "${VEILPIPE_VENV:-$root/.venv}/bin/python" -P -m pytest -m slow tests/e2e/page "$@"
