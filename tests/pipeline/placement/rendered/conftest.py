"""Manifests that engines may be given, and what their stages need."""

import pytest

from pipeline.agreement.manifest import build_manifest
from pipeline.placement.rendered.k8s.cluster import Cluster
from pipeline.placement.rendered.stage_needs import MIB, StageNeeds


def _stage(idx, **changes):
    port = 9000 + 10 * idx
    addresses = {"control": port, "data_in": port + 1, "data_out": port + 11}
    return {
        "stage_idx": idx,
        "layer_start": idx,
        "layer_end": idx + 1,
        "weight_hashes": [f"{idx:064x}"],
        "machine_keys": [f"{idx + 10:064x}"],
        "endpoint": {
            name: {"type": "tcp", "addr": f"node{idx}:{port}"} for name, port in addresses.items()
        },
    } | changes


@pytest.fixture
def stage():
    return _stage


@pytest.fixture
def fields():
    """A plan for three machines of one's own."""
    return {
        "model_name": "m",
        "model_version": "1",
        "total_layers": 3,
        "stages": [_stage(idx) for idx in range(3)],
        "activation_spec": {"dtype": "F32", "hidden_dim": 8, "max_seq_len": 64},
        "config_hash": "c" * 64,
        "orchestrator_keys": ["f" * 64],
    }


@pytest.fixture
def keyed(fields):
    return build_manifest(fields, "test")


@pytest.fixture
def attested(fields):
    """The same in enclaves."""
    pins = {"machine_keys": [], "expected_measurements": {"0": "ab" * 48, "1": "cd" * 48}}
    for idx, each in enumerate(fields["stages"]):
        each |= pins
        each["endpoint"]["data_out"] = {"type": "vsock", "cid": 3, "port": 6000 + idx}
    return build_manifest(fields, "test")


@pytest.fixture
def needs():
    sizes = [(idx + 1) * 100 * MIB for idx in range(3)]
    return [StageNeeds(size, 4 * size, 64 * MIB, 10 * MIB, 2) for size in sizes]


@pytest.fixture
def cluster():
    def make(kind="leaderworkerset", **changes):
        if kind == "enclaves":
            changes = {"enclave_image": "registry/nitro-cli:1"} | changes
            kind = "statefulset"
        return Cluster(image="registry/veilpipe:1", kind=kind, name="vp", **changes)

    return make
