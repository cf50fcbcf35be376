# Shared by the scripts that run a pipeline on this machine. Source it; it starts nothing.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${VEILPIPE_VENV:-$root/.venv}")
# Only absolute entries: an empty one, or `.`, would run what lies beside a downloaded model.
PATH=$(printf %s "$PATH" | tr : '\n' | grep '^/' | paste -sd :)
export PATH="$venv/bin:$PATH"

die() { echo "$(basename "$0"): error: $*" >&2; exit 2; }

# prepare_model: set up the environment and the weights of $MODEL; sets $model_dir.
prepare_model() {
  MODEL=${MODEL:-smollm2}
  bash "$root/scripts/setup.sh" || exit $?
  model_dir=${MODEL_DIR:-$root/models/$MODEL}
  [[ $model_dir != *.gguf || -e $model_dir ]] || die "there is no $model_dir"
  [ -f "$model_dir" ] || [ -f "$model_dir/config.json" ] || [ -f "$model_dir/stage0/config.json" ] ||
    compgen -G "$model_dir/*.gguf" >/dev/null || bash "$root/scripts/download_model.sh" "$MODEL" "$model_dir" >&2 || exit $?
}

# free_base_port COUNT: the first of COUNT consecutive free loopback ports.
free_base_port() {
  python -I - "$1" <<'PY'
import random, socket, sys

count = int(sys.argv[1])
for base in random.sample(range(20000, 32000, 100), 120):
    sockets = []
    try:
        for port in range(base, base + count):
            sock = socket.socket()
            sockets.append(sock)
            sock.bind(("127.0.0.1", port))
        print(base)
        break
    except OSError:
        continue
    finally:
        for sock in sockets:
            sock.close()
else:
    sys.exit("no free loopback ports")
PY
}

# stop_children: end every background process of this shell, politely and then not.
stop_children() {
  local pids
  pids=$(jobs -p)
  [ -n "$pids" ] || return 0
  kill -TERM $pids 2>/dev/null || true
  for _ in $(seq 50); do
    kill -0 $pids 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL $pids 2>/dev/null || true
  wait $pids 2>/dev/null || true
}
