"""A manifest as files for `kubectl apply`, and the one that an orchestrator then loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from pipeline.agreement.manifest import Manifest, dump_manifest
from pipeline.errors import InputError
from pipeline.files import new_directory
from pipeline.placement.rendered.k8s.cluster import Cluster, Objects
from pipeline.placement.rendered.k8s.network import policies, services
from pipeline.placement.rendered.k8s.pod import MANIFEST_FILE
from pipeline.placement.rendered.k8s.workload import disruption_budget, workloads
from pipeline.placement.rendered.placeable import check_placeable
from pipeline.placement.rendered.stage_needs import StageNeeds

# `kubectl apply -f DIR` reads every file there, and none of its directories.
ORCHESTRATOR_DIRECTORY = "orchestrator"
# Of a cluster's store, for one object.
MAX_CONFIG_BYTES = 1_000_000


def render(
    manifest: Manifest, cluster: Cluster, needs: Sequence[StageNeeds]
) -> Mapping[str, Objects]:
    """The objects by what their file is called. Raises PolicyError, InputError."""
    check_placeable(manifest)
    num_stages = len(manifest.stages)
    return {
        "manifest": [_config_map(manifest, cluster)],
        "services": services(cluster, num_stages),
        "network-policies": policies(cluster, num_stages),
        "workloads": workloads(manifest, cluster, needs),
        "disruption-budget": [disruption_budget(cluster)],
    }


def write(
    manifest: Manifest, cluster: Cluster, needs: Sequence[StageNeeds], output: Path
) -> list[Path]:
    """Write all of it to a new directory; the paths. Raises as `render`, and for the directory."""
    rendered = render(manifest, cluster, needs)
    with new_directory(output) as directory:
        for name, objects in rendered.items():
            # Copied, or what is said twice would be a reference, which people do not write.
            apart = json.loads(json.dumps(objects))
            text = yaml.safe_dump_all(apart, sort_keys=False, allow_unicode=True)
            (directory / f"{name}.yaml").write_text(text)
        (directory / ORCHESTRATOR_DIRECTORY).mkdir()
        placed = directory / ORCHESTRATOR_DIRECTORY / MANIFEST_FILE
        placed.write_text(dump_manifest(cluster.placed(manifest)))
    return [output / f"{name}.yaml" for name in rendered]


def _config_map(manifest: Manifest, cluster: Cluster) -> dict[str, object]:
    text = dump_manifest(cluster.placed(manifest))
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(
            f"the manifest takes {len(text)} bytes, and a ConfigMap has {MAX_CONFIG_BYTES}; "
            "cut the model with `pipeline-orch shard`: its manifest names a file for each stage"
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": cluster.metadata(cluster.name),
        "data": {MANIFEST_FILE: text},
    }
