"""The pod of a stage that is known by its node's key."""

from pipeline.placement.rendered.k8s.cluster import (
    CONTROL_PORT,
    DATA_PORT,
    HEALTH_PORT,
    Cluster,
)
from pipeline.placement.rendered.stage_needs import StageNeeds

Spec = dict[str, object]

# No account of any node; as the image has it.
USER = 65532
STAGE_VARIABLE = "VEILPIPE_STAGE_IDX"
MANIFEST_FILE = "manifest.json"
# Longer than a step, which a worker finishes before it leaves.
GRACE_SECONDS = 120


def stage_pod(cluster: Cluster, stage: Spec, needs: StageNeeds) -> Spec:
    """A worker; `stage` is what its variable says which stage it is of.

    Its part comes from a volume that it cannot write; it is ready once that has the hashes of the
    manifest. Its key lies on the node, where it was made.
    """
    cpu = str(needs.num_threads)
    container: Spec = {
        "name": "stage",
        "image": cluster.image,
        "command": ["stage-worker"],
        "args": [
            f"--manifest=/etc/veilpipe/{MANIFEST_FILE}",
            "--model-dir=/part",
            "--identity=/keys/machine.pem",
            f"--control-listen=0.0.0.0:{CONTROL_PORT}",
            f"--data-in-listen=0.0.0.0:{DATA_PORT}",
            f"--health=0.0.0.0:{HEALTH_PORT}",
            *needs.worker_flags,
            "--log-format=json",
        ],
        "env": [{"name": STAGE_VARIABLE} | stage],
        "ports": [
            {"name": "control", "containerPort": CONTROL_PORT},
            {"name": "data", "containerPort": DATA_PORT},
            {"name": "health", "containerPort": HEALTH_PORT},
        ],
        "resources": {
            "requests": {"cpu": cpu, "memory": f"{needs.memory_mib}Mi"},
            "limits": {"cpu": cpu, "memory": f"{needs.limit_mib}Mi"},
        },
        "startupProbe": _probe("/livez", period=2, failures=60),
        "livenessProbe": _probe("/livez", period=10, failures=3),
        "readinessProbe": _probe("/readyz", period=2, failures=1),
        "securityContext": locked_down(),
        "volumeMounts": [
            {"name": "manifest", "mountPath": "/etc/veilpipe", "readOnly": True},
            _own_part("parts", "/part"),
            _own_part("keys", "/keys"),
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  (the container's own)
        ],
    }
    if cluster.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": cluster.secret}}]
    keys = {"path": cluster.keys_path, "type": "Directory"}
    volumes: list[Spec] = [
        {"name": "manifest", "configMap": {"name": cluster.name}},
        parts_volume(cluster),
        {"name": "keys", "hostPath": keys},
        {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
    ]
    return pod(cluster, [container], volumes) | {
        "nodeSelector": {f"veilpipe/{cluster.name}": "stage"}
    }


def pod(cluster: Cluster, containers: list[Spec], volumes: list[Spec]) -> Spec:
    """What every stage's pod has: nobody's account, and no way to the cluster's own interface."""
    spec: Spec = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
        "volumes": volumes,
    }
    if cluster.pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": cluster.pull_secret}]
    return spec


def locked_down() -> Spec:
    """A container that can change nothing, and become nobody else."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def parts_volume(cluster: Cluster) -> Spec:
    """What `pipeline-orch shard` has written, wherever the claim keeps it."""
    claim = {"claimName": cluster.claim, "readOnly": True}
    return {"name": "parts", "persistentVolumeClaim": claim}


def _own_part(name: str, path: str) -> Spec:
    """This stage's directory of a volume, and no other's."""
    own = f"stage$({STAGE_VARIABLE})"
    return {"name": name, "mountPath": path, "subPathExpr": own, "readOnly": True}


def _probe(path: str, *, period: int, failures: int) -> Spec:
    return {
        "httpGet": {"path": path, "port": "health"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }
