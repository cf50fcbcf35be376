"""Manifests that name what no other machine reaches, or nobody whom a stage could be held to."""

import pytest

from pipeline.agreement.manifest import build_manifest
from pipeline.errors import InputError, PolicyError
from pipeline.placement.rendered.placeable import check_placeable


@pytest.fixture
def refused(fields):
    """The line for a plan that is altered first."""

    def run(alter):
        alter(fields)
        with pytest.raises(InputError) as caught:
            check_placeable(build_manifest(fields, "test"))
        assert "\n" not in str(caught.value)
        return caught.value

    return run


def test_plans_for_keyed_machines_and_for_enclaves_may_be_placed(keyed, attested):
    check_placeable(keyed)
    check_placeable(attested)


def test_a_core_without_addresses_may_be_placed(fields):
    for stage in fields["stages"]:
        del stage["endpoint"]
    check_placeable(build_manifest(fields, "test"))


@pytest.mark.parametrize("address", [{"type": "unix", "path": "/run/s"},
                                     {"type": "unix", "path": "/run/s", "port": 5},
                                     {"type": "vsock", "cid": 16, "port": 5000}])  # fmt: skip
@pytest.mark.parametrize("name", ["control", "data_in", "data_out"])
def test_addresses_of_one_machine_are_refused(refused, address, name):
    error = refused(lambda fields: fields["stages"][1]["endpoint"].update({name: address}))
    assert f"stage 1's {name} is {address['type']}:" in str(error)


def test_an_enclave_may_be_reached_by_vsock_and_not_by_a_bridge_of_one_machine(attested, refused):
    def bridged(fields):
        pins = {"machine_keys": [], "expected_measurements": {"0": "ab" * 48}}
        fields["stages"][0] |= pins
        fields["stages"][0]["endpoint"]["control"] = {"type": "unix", "path": "/v", "port": 5000}

    assert "stage 0's control is unix:/v:5000" in str(refused(bridged))


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (lambda f: f["stages"][1].update(weight_hashes=[]), "is no plan: nothing pins"),
        (lambda f: f.pop("config_hash"), "is no plan: nothing pins"),
        (lambda f: f["stages"][2].update(machine_keys=[]), "tells stage 2 from another process"),
        (lambda f: f.pop("orchestrator_keys"), "orchestrator_keys"),
        (
            lambda f: f["stages"][0].update(
                machine_keys=[], expected_measurements={"0": "00" * 48}
            ),
            "PCR 0 that is not zero",
        ),
    ],
)
def test_a_stage_that_could_not_be_told_from_another_process_is_refused(refused, alter, words):
    error = refused(alter)
    assert isinstance(error, PolicyError)
    assert words in str(error)


def test_what_belongs_at_home_is_not_placed(refused):
    assert "at home" in str(refused(lambda f: f.update(home_stages={"first": 1, "last": 1})))
