"""Templates: what launching enclaves decides is filled in, and asked for where it is missing."""

from pathlib import Path

import pytest

from pipeline.agreement.manifest import load_manifest
from pipeline.agreement.templates import require_cids, with_cids
from pipeline.errors import InputError

MANIFESTS = Path(__file__).resolve().parents[3] / "manifests"


def addresses(manifest):
    return [
        [
            str(getattr(stage.endpoint, name).to_endpoint())
            for name in ("control", "data_in", "data_out")
        ]
        for stage in manifest.stages
    ]


def test_an_enclaves_cid_is_at_its_own_addresses_and_what_it_sends_goes_to_its_parent():
    template = load_manifest(MANIFESTS / "manifest_2stage_vsock.json")
    filled = with_cids(template, {0: 20, 1: 31})
    assert addresses(filled) == [
        ["vsock:20:5000", "vsock:20:5001", "vsock:3:5001"],
        ["vsock:31:5000", "vsock:31:5001", "vsock:3:5002"],
    ]
    require_cids(filled)
    assert filled.core_hash() == template.core_hash()


def test_tcp_addresses_and_a_parents_stay_and_a_cid_that_is_given_beats_the_manifests():
    manifest = load_manifest(MANIFESTS / "smollm2_2stage_vsock.json")
    before = addresses(manifest)
    assert with_cids(manifest, {}) == manifest
    before[1][1] = "vsock:40:5001"
    assert addresses(with_cids(manifest, {1: 40})) == before


def test_what_is_dialed_without_a_cid_is_named_before_anything_is_dialed():
    template = load_manifest(MANIFESTS / "manifest_3stage_vsock.json")
    with pytest.raises(InputError, match="--cid 2=CID"):
        require_cids(with_cids(template, {0: 16, 1: 17}))
    with pytest.raises(InputError, match="--cid 0=CID"):
        require_cids(template)
    with pytest.raises(InputError, match="--cid 3: the manifest has 3 stages"):
        with_cids(template, {3: 16})


def test_a_core_alone_has_no_addresses_to_fill_in():
    template = load_manifest(MANIFESTS / "manifest_2stage_vsock.json")
    stages = tuple(stage.model_copy(update={"endpoint": None}) for stage in template.stages)
    core = template.model_copy(update={"stages": stages})
    assert with_cids(core, {0: 16}) == core
    require_cids(core)
