"""Stages that somebody else starts, wherever that is now."""

from pathlib import Path

import pytest

from pipeline.agreement.addresses import TcpAddress
from pipeline.agreement.manifest import dump_manifest, load_manifest
from pipeline.errors import ManifestError
from pipeline.placement.by_hand import ByHand
from pipeline.planning.plan import PlanOptions, plan
from transport.dial_and_listen import VsockEndpoint


@pytest.fixture
def manifest(tiny_model):
    return plan(tiny_model, PlanOptions(2))


def moved(manifest, port):
    address = TcpAddress(type="tcp", addr=f"127.0.0.1:{port}")
    stages = [
        stage.model_copy(
            update={"endpoint": stage.endpoint.model_copy(update={"control": address})}
        )
        for stage in manifest.stages
    ]
    return manifest.model_copy(update={"stages": tuple(stages)})


def port(placement):
    return placement.where(1).control.to_endpoint().port


@pytest.fixture
def path(manifest, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(dump_manifest(manifest))
    return path


def test_addresses_are_those_of_the_file_as_it_is_now(manifest, path):
    placement = ByHand(manifest, path)
    before = port(placement)
    for now in (before + 1, before + 2):
        path.write_text(dump_manifest(moved(manifest, now)))
        assert port(placement) == now


def test_cids_of_started_enclaves_count_in_a_file_that_has_changed_as_well(tmp_path):
    manifests = Path(__file__).resolve().parents[3] / "manifests"
    template = load_manifest(manifests / "manifest_2stage_vsock.json")
    path = tmp_path / "manifest.json"
    path.write_text(dump_manifest(template))
    placement = ByHand(template, path, {0: 20, 1: 31})
    assert placement.where(1).control.to_endpoint() == VsockEndpoint(31, 5000)
    text = dump_manifest(template).replace("5002", "5003")
    path.write_text(text)
    after = placement.where(1)
    assert after.data_in.to_endpoint() == VsockEndpoint(31, 5001)
    assert after.data_out.to_endpoint() == VsockEndpoint(3, 5003)


def test_a_file_that_cannot_be_read_changes_nothing(manifest, path, caplog):
    placement = ByHand(manifest, path)
    before = port(placement)
    path.write_text(dump_manifest(moved(manifest, 1))[:100])
    assert port(placement) == before
    path.unlink()
    assert port(placement) == before
    assert "addresses_unreadable" in caplog.text
    path.write_text(dump_manifest(moved(manifest, before + 1)))
    assert port(placement) == before + 1


def test_another_pipelines_addresses_are_not_taken(manifest, path, caplog):
    placement = ByHand(manifest, path)
    before = port(placement)
    other = moved(manifest, 1).model_copy(update={"model_version": "2"})
    path.write_text(dump_manifest(other))
    assert port(placement) == before
    assert "another_core" in caplog.text


def test_a_core_alone_is_nowhere(manifest):
    stages = tuple(stage.model_copy(update={"endpoint": None}) for stage in manifest.stages)
    with pytest.raises(ManifestError, match="no endpoint"):
        ByHand(manifest.model_copy(update={"stages": stages})).where(0)
