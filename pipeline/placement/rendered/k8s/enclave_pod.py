"""The pod of a stage in a Nitro enclave: what launches it, and a relay that carries ciphertext."""

import shlex

from pipeline.errors import InputError
from pipeline.placement.rendered.k8s.cluster import (
    CONTROL_PORT,
    DATA_PORT,
    ENCLAVE_CONTROL_PORT,
    ENCLAVE_DATA_PORT,
    ENCLAVE_OUT_PORT,
    FIRST_CID,
    Cluster,
)
from pipeline.placement.rendered.k8s.pod import Spec, locked_down, parts_volume, pod
from pipeline.placement.rendered.stage_needs import MIB, StageNeeds
from transport.dial_and_listen import PARENT_CID

# An image is unpacked into the memory that it computes in, beside the system it brings along; as
# `python -m enclave build` reckons, by its size.
_MEMORY_PER_IMAGE_BYTE = 4
_SYSTEM_BYTES = 512 * MIB
_HUGE_PAGE_MIB = 2

# Ends with the enclave, and the enclave with it.
_LAUNCH = """\
set -eu
trap 'nitro-cli terminate-enclave --enclave-name {name}; exit 0' TERM INT
nitro-cli run-enclave --enclave-name {name} --eif-path /images/stage{idx}.eif \\
  --enclave-cid {cid} --cpu-count {cpus} --memory {memory}
while nitro-cli describe-enclaves | grep -q RUNNING; do sleep 2 & wait $!; done
echo 'the enclave has ended' >&2
exit 1
"""


def enclave_memory_mib(needs: StageNeeds) -> int:
    """What the enclave of such a stage is given, in whole huge pages."""
    weights = max(
        _MEMORY_PER_IMAGE_BYTE * needs.weight_bytes,
        2 * needs.weight_bytes + needs.widest_weight_bytes,
    )
    system = _MEMORY_PER_IMAGE_BYTE * _SYSTEM_BYTES
    total = system + weights + needs.session_bytes + needs.step_bytes
    pages = -(-total // (_HUGE_PAGE_MIB * MIB))
    return pages * _HUGE_PAGE_MIB


def enclave_pod(cluster: Cluster, stage_idx: int, num_stages: int, needs: StageNeeds) -> Spec:
    """An enclave and its relay. Raises InputError where nothing is named that has nitro-cli."""
    if cluster.enclave_image is None:
        raise InputError(
            f"stage {stage_idx} runs in an enclave; --enclave-image names an image with nitro-cli"
        )
    memory = enclave_memory_mib(needs)
    # Whole cores: enclaves get both of a core's threads.
    num_cpus = needs.num_threads + needs.num_threads % 2
    script = _LAUNCH.format(
        name=shlex.quote(cluster.service(stage_idx)),
        idx=stage_idx,
        cid=FIRST_CID + stage_idx,
        cpus=num_cpus,
        memory=memory,
    )
    resources = {
        "cpu": "250m",
        "memory": "256Mi",
        "aws.ec2.nitro/nitro_enclaves": "1",
        f"hugepages-{_HUGE_PAGE_MIB}Mi": f"{memory}Mi",
    }
    is_running = ["/bin/sh", "-c", "nitro-cli describe-enclaves | grep -q RUNNING"]
    launcher: Spec = {
        "name": "enclave",
        "image": cluster.enclave_image,
        "command": ["/bin/sh", "-c", script],
        "resources": {"requests": resources, "limits": dict(resources)},
        "readinessProbe": {"exec": {"command": is_running}, "periodSeconds": 5},
        "securityContext": locked_down(),
        "volumeMounts": [
            {"name": "parts", "mountPath": "/images", "readOnly": True},
            {"name": "hugepages", "mountPath": "/dev/hugepages"},
            {"name": "run", "mountPath": "/run/nitro_enclaves"},
            {"name": "log", "mountPath": "/var/log/nitro_enclaves"},
        ],
    }
    volumes: list[Spec] = [
        parts_volume(cluster),
        {"name": "hugepages", "emptyDir": {"medium": f"HugePages-{_HUGE_PAGE_MIB}Mi"}},
        {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        {"name": "log", "emptyDir": {"sizeLimit": "64Mi"}},
    ]
    spec = pod(cluster, [launcher, _relay(cluster, stage_idx, num_stages)], volumes)
    security = spec["securityContext"]
    assert isinstance(security, dict)  # as `pod` makes it
    # What runtimes allow by default has no AF_VSOCK in it.
    security["seccompProfile"] = {"type": "Localhost", "localhostProfile": cluster.enclave_seccomp}
    security["supplementalGroups"] = [cluster.enclave_group]
    return spec | {"nodeSelector": {"aws-nitro-enclaves-k8s-dp": "enabled"}}


def _relay(cluster: Cluster, stage_idx: int, num_stages: int) -> Spec:
    cid = FIRST_CID + stage_idx
    maps = [
        f"0.0.0.0:{CONTROL_PORT}=vsock:{cid}:{ENCLAVE_CONTROL_PORT}",
        f"0.0.0.0:{DATA_PORT}=vsock:{cid}:{ENCLAVE_DATA_PORT}",
    ]
    if stage_idx < num_stages - 1:
        target = f"{cluster.service(stage_idx + 1)}.{cluster.namespace}.svc:{DATA_PORT}"
        maps.append(f"vsock:{PARENT_CID}:{ENCLAVE_OUT_PORT + stage_idx}={target}")
    resources = {"cpu": "250m", "memory": "256Mi"}
    listens: Spec = {"tcpSocket": {"port": "control"}, "periodSeconds": 10, "failureThreshold": 3}
    return {
        "name": "relay",
        "image": cluster.image,
        "command": ["pipeline-relay"],
        "args": [f"--map={each}" for each in maps],
        "ports": [
            {"name": "control", "containerPort": CONTROL_PORT},
            {"name": "data", "containerPort": DATA_PORT},
        ],
        "resources": {"requests": resources, "limits": dict(resources)},
        "livenessProbe": listens,
        "readinessProbe": dict(listens),
        "securityContext": locked_down(),
    }
