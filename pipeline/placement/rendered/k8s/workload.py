"""What runs: one set of all stages, or one for each; a stage that is lost comes back alone."""

from collections.abc import Sequence
from functools import reduce

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError
from pipeline.placement.rendered.k8s.cluster import Cluster, Objects, selector
from pipeline.placement.rendered.k8s.enclave_pod import enclave_pod
from pipeline.placement.rendered.k8s.pod import Spec, stage_pod
from pipeline.placement.rendered.stage_needs import StageNeeds

_INDEX_LABEL = "metadata.labels['leaderworkerset.sigs.k8s.io/worker-index']"


def workloads(manifest: Manifest, cluster: Cluster, needs: Sequence[StageNeeds]) -> Objects:
    """The sets, with what each stage needs. Raises InputError where one set cannot hold all."""
    if cluster.kind == "leaderworkerset":
        return [_leader_worker_set(manifest, cluster, needs)]
    return [_stateful_set(manifest, cluster, idx, each) for idx, each in enumerate(needs)]


def disruption_budget(cluster: Cluster) -> dict[str, object]:
    """Nodes are drained a stage at a time: the next once the one before is back and ready."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": cluster.metadata(cluster.name),
        "spec": {"maxUnavailable": 1, "selector": selector(cluster.labels)},
    }


def _leader_worker_set(
    manifest: Manifest, cluster: Cluster, needs: Sequence[StageNeeds]
) -> dict[str, object]:
    if any(stage.expected_measurements for stage in manifest.stages):
        raise InputError(
            "--kind leaderworkerset: enclaves have a CID each, and all workers of such a set are "
            "alike; use --kind statefulset"
        )
    index: Spec = {"valueFrom": {"fieldRef": {"fieldPath": _INDEX_LABEL}}}
    # All but the leader share a template, so each gets what is enough for any of them.
    first, others = needs[0], reduce(StageNeeds.most, needs[1:] or needs)
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": cluster.metadata(cluster.name),
        "spec": {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": len(needs),
                "restartPolicy": "None",
                "leaderTemplate": _template(cluster.labels, stage_pod(cluster, index, first)),
                "workerTemplate": _template(cluster.labels, stage_pod(cluster, index, others)),
            },
        },
    }


def _stateful_set(
    manifest: Manifest, cluster: Cluster, idx: int, needs: StageNeeds
) -> dict[str, object]:
    labels = cluster.stage_labels(idx)
    if manifest.stages[idx].expected_measurements:
        spec = enclave_pod(cluster, idx, len(manifest.stages), needs)
    else:
        spec = stage_pod(cluster, {"value": str(idx)}, needs)
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": cluster.metadata(cluster.service(idx)),
        "spec": {
            "replicas": 1,
            "serviceName": cluster.service(idx),
            "selector": selector(labels),
            "template": _template(labels, spec),
        },
    }


def _template(labels: dict[str, str], spec: Spec) -> dict[str, object]:
    return {"metadata": {"labels": labels}, "spec": spec}
