#!/usr/bin/env bash
# Run stage images as Nitro enclaves on this AWS parent instance, with the relay in front of them.
#
#   scripts/run_nitro.sh --results HOST:PORT [--base-port 9000] [--debug] STAGE0.eif [STAGE1.eif …]
#
# --results    where the orchestrator's --data-out-listen is reached from here
# --base-port  TCP ports for the orchestrator: BASE+2I is stage I's control, BASE+1 the first's data
# --debug      attach the consoles; the enclaves then attest PCR0 = 0, which verifiers refuse
#
# Enclave I gets CID 16+I. Inside, a stage listens for control on vsock port 5000 and for data on
# 5001, and sends its results to CID 3 port 6000+I. All this machine carries is ciphertext. Ends,
# with every enclave it started, on Ctrl-C. Needs an instance launched with enclaves enabled,
# nitro-cli, and root for the allocator.
set -euo pipefail

# shellcheck source=scripts/lib.sh
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"

usage() { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }

results='' base_port=9000 debug=() images=()
while [ $# -gt 0 ]; do
  case $1 in
    --results) results=${2:-}; shift 2 || die "--results needs HOST:PORT" ;;
    --base-port) base_port=${2:-}; shift 2 || die "--base-port needs a number" ;;
    --debug) debug=(--debug-mode); shift ;;
    -h | --help) usage 0 ;;
    -*) die "unknown option $1" ;;
    *) images+=("$1"); shift ;;
  esac
done
[ ${#images[@]} -gt 0 ] || die "which images? give stage0.eif and so on"
[[ $results =~ ^.+:[0-9]+$ ]] || die "--results ${results:-is missing}: give HOST:PORT of the orchestrator"
[[ $base_port =~ ^[0-9]+$ ]] || die "--base-port $base_port is no number"

bash "$root/scripts/setup.sh" || exit $?
cpus=0 memory_mib=0 image_cpus_of=() image_mib_of=()
for image in "${images[@]}"; do
  python -m enclave verify "$image" >/dev/null || die "$image does not verify"
  read -r image_cpus image_mib < <(python -m enclave describe -j "$image" | python -c \
    'import json, sys; report = json.load(sys.stdin); print(report["DefaultCpus"], report["DefaultMemoryMiB"])')
  image_cpus_of+=("$image_cpus")
  image_mib_of+=("$image_mib")
  cpus=$((cpus + image_cpus))
  memory_mib=$((memory_mib + image_mib))
done

command -v nitro-cli >/dev/null || die "nitro-cli is not installed (Amazon Linux: dnf install aws-nitro-enclaves-cli)"
[ -e /dev/nitro_enclaves ] || die "no /dev/nitro_enclaves: launch the instance with enclaves enabled"

# The allocator sets CPUs and memory aside; it is asked only when it holds too little.
allocator=/etc/nitro_enclaves/allocator.yaml
held() { # FIELD: what the allocator's configuration gives it, 0 if nothing
  local value
  value=$(sed -n "s/^$1: *\([0-9][0-9]*\).*/\1/p" "$allocator" 2>/dev/null | head -n 1) || true
  echo "${value:-0}"
}
if [ "$(held memory_mib)" -lt "$memory_mib" ] || [ "$(held cpu_count)" -lt "$cpus" ]; then
  [ "$(id -u)" -eq 0 ] || die "the allocator holds too little: run as root, or set memory_mib $memory_mib and cpu_count $cpus in $allocator"
  printf -- '---\nmemory_mib: %s\ncpu_count: %s\n' "$memory_mib" "$cpus" >"$allocator"
  systemctl restart nitro-enclaves-allocator.service || die "the allocator cannot set aside $memory_mib MiB and $cpus CPUs"
fi

enclaves=()
cleanup() {
  stop_children
  for id in "${enclaves[@]}"; do
    nitro-cli terminate-enclave --enclave-id "$id" >/dev/null || echo "cannot terminate enclave $id" >&2
  done
}
trap cleanup EXIT
trap 'exit 130' INT TERM

maps=(--map "tcp:0.0.0.0:$((base_port + 1))=vsock:16:5001")
last=$((${#images[@]} - 1))
for index in "${!images[@]}"; do
  maps+=(--map "tcp:0.0.0.0:$((base_port + 2 * index))=vsock:$((16 + index)):5000")
  if [ "$index" -lt "$last" ]; then
    maps+=(--map "vsock:3:$((6000 + index))=vsock:$((17 + index)):5001")
  else
    maps+=(--map "vsock:3:$((6000 + index))=tcp:$results")
  fi
done
pipeline-relay "${maps[@]}" &
relay=$!

for index in "${!images[@]}"; do
  started=$(nitro-cli run-enclave --eif-path "${images[$index]}" --enclave-cid $((16 + index)) \
    --cpu-count "${image_cpus_of[$index]}" --memory "${image_mib_of[$index]}" "${debug[@]}") ||
    die "stage $index did not start"
  id=$(python -c 'import json, sys; print(json.loads(sys.argv[1])["EnclaveID"])' "$started")
  enclaves+=("$id")
  echo "stage $index runs in enclave $id, CID $((16 + index))"
  [ ${#debug[@]} -eq 0 ] || nitro-cli console --enclave-id "$id" &
done
echo "ready: control ports $base_port-$((base_port + 2 * last)), first data port $((base_port + 1)); Ctrl-C ends it"
wait "$relay"
