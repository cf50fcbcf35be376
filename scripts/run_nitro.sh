#!/usr/bin/env bash
# Run the stages of a manifest as Nitro enclaves on this AWS parent instance, the relay before them.
#
#   scripts/run_nitro.sh --manifest M [--results HOST:PORT] [--images DIR] [--cid STAGE=CID]... [--debug]
#
# --manifest  what scripts/build_nitro.sh has pinned; says which TCP ports lead to which stage
# --results   where the orchestrator's --data-out-listen is reached from here; without, it is on this
#             machine and takes the last stage's results itself
# --images    where stage0.eif and so on are (default: beside the manifest)
# --cid       the CID that a stage's enclave gets, if not 16 + STAGE; again for each
# --debug     attach the consoles; the enclaves then attest PCR0 = 0, which verifiers refuse
#
# A manifest whose vsock CIDs are 0 is a template: an orchestrator on this machine takes the same
# --cid. Inside, a stage listens for control on vsock port 5000 and for data on 5001, and sends its
# results to a port of CID 3 that the manifest names. All this machine carries is ciphertext.
# Ends, with every enclave it started, on Ctrl-C. Needs an instance launched with enclaves enabled,
# nitro-cli, and root for the allocator.
set -euo pipefail

# shellcheck source=scripts/lib.sh
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
unset PYTHONPATH PYTHONHOME # this may run as root: only what is installed is run

usage() { sed -n '2,18s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }

manifest='' results='' images='' debug=() cids=() relay=()
while [ $# -gt 0 ]; do
  case $1 in
    --debug) debug=(--debug-mode); shift; continue ;;
    -h | --help) usage 0 ;;
    --manifest | --results | --images | --cid) [ $# -ge 2 ] || die "$1 needs a value" ;;
    *) die "unknown option $1" ;;
  esac
  case $1 in
    --manifest) manifest=$2 ;;
    --results) results=$2 ;;
    --images) images=$2 ;;
    --cid)
      [[ $2 =~ ^(0|[1-9][0-9]*)=[1-9][0-9]*$ ]] || die "--cid $2: write STAGE=CID, such as 1=17"
      cids[${2%=*}]=${2#*=}
      relay+=(--cid "$2")
      ;;
  esac
  shift 2
done
[ -f "$manifest" ] || die "--manifest ${manifest:-is missing}: no such file"
if [ -n "$results" ]; then
  [[ $results =~ ^.+:[0-9]+$ ]] || die "--results $results: give HOST:PORT of the orchestrator"
  relay+=(--results "$results")
fi
images=${images:-$(dirname "$manifest")}

bash "$root/scripts/setup.sh" || exit $?
num_stages=$(python -I -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["stages"]))' "$manifest" 2>/dev/null) ||
  die "$manifest has no list of stages"
cpus=0 memory_mib=0 cpus_of=() mib_of=()
for ((stage = 0; stage < num_stages; stage++)); do
  image=$images/stage$stage.eif
  # An image the user has not pinned would be refused by every orchestrator: say so now.
  reason=$(python -I -m enclave verify "$image" --manifest "$manifest" --stage "$stage" 2>&1 >/dev/null) ||
    die "$image is not what $manifest pins for stage $stage: ${reason%%$'\n'*}"
  read -r image_cpus image_mib < <(python -I -m enclave describe -j "$image" | python -I -c \
    'import json, sys; report = json.load(sys.stdin); print(report["DefaultCpus"], report["DefaultMemoryMiB"])')
  cpus_of+=("$image_cpus")
  mib_of+=("$image_mib")
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

pipeline-relay --manifest "$manifest" "${relay[@]}" &
relay_pid=$!
sleep 1
kill -0 "$relay_pid" 2>/dev/null || die "the relay did not start"

for ((stage = 0; stage < num_stages; stage++)); do
  cid=${cids[$stage]:-$((16 + stage))}
  started=$(nitro-cli run-enclave --eif-path "$images/stage$stage.eif" --enclave-cid "$cid" \
    --cpu-count "${cpus_of[$stage]}" --memory "${mib_of[$stage]}" "${debug[@]}") ||
    die "stage $stage did not start"
  id=$(python -I -c 'import json, sys; print(json.loads(sys.argv[1])["EnclaveID"])' "$started")
  enclaves+=("$id")
  echo "stage $stage runs in enclave $id, CID $cid"
  [ ${#debug[@]} -eq 0 ] || nitro-cli console --enclave-id "$id" &
done
echo "ready; Ctrl-C ends it"
wait "$relay_pid"
