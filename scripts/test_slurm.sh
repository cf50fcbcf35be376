#!/usr/bin/env bash
# Run the stages of a manifest by Slurm, three nodes on this machine: generate text, lose a stage,
# cancel the job.
#
#   scripts/test_slurm.sh [pytest arguments]
#
# Installs Debian's slurmd, slurmctld and munge where it may, without starting their services; those
# it starts are its own, below a temporary directory, and end with it. Needs root. Exit codes: 75
# where Slurm cannot be had, else pytest's.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || { echo "test_slurm: no $python: run scripts/setup.sh first" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "test_slurm: needs root, as slurmd does" >&2; exit 75; }

have() { command -v "$1" >/dev/null; }
if ! have slurmctld || ! have slurmd || ! have munged || ! have sbatch; then
  # Unpacked only: Debian would start services, which nobody here asked for.
  { apt-get update &&
    RUNLEVEL=1 apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge; } >/dev/null 2>&1 ||
    { echo "test_slurm: cannot install slurmctld, slurmd and munge" >&2; exit 75; }
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/veilpipe-slurm.XXXXXX")
chmod 755 "$work"
daemons=()
cleanup() {
  # The last first: munged, which all of them ask, ends when they have.
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do
    kill "${daemons[$i]}" 2>/dev/null && wait "${daemons[$i]}" || true
  done
  if [ "${status:-1}" -ne 0 ]; then
    for log in "$work"/*.log; do [ -e "$log" ] && { echo "--- ${log##*/}"; tail -n 15 "$log"; }; done >&2
  fi
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# free_ports COUNT: so many that are free now, one a line.
free_ports() {
  "$python" -I -c 'import socket, sys
socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(sock.getsockname()[1] for sock in socks), sep="\n")' "$1"
}
mapfile -t ports < <(free_ports 4)

mkdir -m 700 "$work/munge"
head -c 1024 /dev/urandom >"$work/munge/key"
chmod 600 "$work/munge/key"
host=$(hostname)
{
  echo "ClusterName=veilpipe"
  echo "SlurmctldHost=$host(127.0.0.1)"
  echo "SlurmctldPort=${ports[3]}"
  echo "SlurmUser=root"
  echo "AuthType=auth/munge"
  echo "AuthInfo=socket=$work/munge.socket"
  echo "CredType=cred/munge"
  echo "StateSaveLocation=$work/state"
  echo "SlurmdSpoolDir=$work/spool-%n"
  echo "SlurmctldPidFile=$work/slurmctld.pid"
  echo "SlurmdPidFile=$work/slurmd-%n.pid"
  echo "SlurmctldLogFile=$work/slurmctld.log"
  echo "SlurmdLogFile=$work/slurmd-%n.log"
  echo "ProctrackType=proctrack/linuxproc"
  echo "TaskPlugin=task/none"
  echo "SelectType=select/cons_tres"
  echo "SelectTypeParameters=CR_Core_Memory"
  echo "SlurmdParameters=config_overrides"
  echo "MpiDefault=none"
  echo "ReturnToService=2"
  # Nothing here is as quick as a cluster.
  echo "MessageTimeout=60"
  echo "KillWait=60"
  for i in 0 1 2; do
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$i]} CPUs=2 RealMemory=16000"
  done
  echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
} >"$work/slurm.conf"
export SLURM_CONF=$work/slurm.conf
mkdir "$work/state"

munged --foreground --force --socket="$work/munge.socket" --key-file="$work/munge/key" \
  --log-file="$work/munged.log" --pid-file="$work/munged.pid" --seed-file="$work/munge/seed" \
  >"$work/munged.out.log" 2>&1 &
daemons+=($!)
until [ -S "$work/munge.socket" ]; do
  kill -0 "${daemons[0]}" 2>/dev/null || { echo "test_slurm: munged did not start" >&2; exit 1; }
  sleep 0.1
done
slurmctld -D >"$work/slurmctld.out.log" 2>&1 &
daemons+=($!)
for i in 0 1 2; do
  slurmd -D -N "node$i" >"$work/slurmd-node$i.out.log" 2>&1 &
  daemons+=($!)
done
until [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 3 ]; do
  for pid in "${daemons[@]}"; do
    kill -0 "$pid" 2>/dev/null || { echo "test_slurm: one of Slurm's daemons has ended" >&2; exit 1; }
  done
  sleep 0.2
done

cd "$root"
status=0
VEILPIPE_SLURM=$work "$python" -P -m pytest -q tests/e2e/test_slurm.py -m slow "$@" || status=$?
exit "$status"
