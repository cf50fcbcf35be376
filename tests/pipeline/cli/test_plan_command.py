"""`pipeline-orch plan`: what its flags put into a manifest."""

import json
import sys

import pytest

from pipeline.cli import pipeline_orch


@pytest.fixture
def planned(tiny_model, monkeypatch, capfd):
    """Plans two stages of the tiny model with these flags: the manifest."""

    def run(*flags):
        command = ["plan", "--model-dir", str(tiny_model), "--stages", "2", *flags]
        monkeypatch.setattr(sys, "argv", ["pipeline-orch", *command])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        out, err = capfd.readouterr()
        if caught.value.code:
            return err
        return json.loads(out)

    return run


def controls(manifest):
    return [stage["endpoint"]["control"]["addr"] for stage in manifest["stages"]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ["127.0.0.1:9000", "127.0.0.1:9010"]),
        (("--host", "a"), ["a:9000", "a:9010"]),
        (("--host", "a,b"), ["a:9000", "b:9010"]),
        (("--host", "a", "--host", "b"), ["a:9000", "b:9010"]),
        (("--host", "a, ::1,c"), ["a:9000", "[::1]:9010"]),
    ],
)
def test_hosts_are_the_stages_in_order_however_they_are_listed(planned, flags, expected):
    assert controls(planned(*flags)) == expected


def test_a_name_may_be_given(planned, tiny_model):
    assert planned()["model_name"] == tiny_model.resolve().name
    assert planned("--model-name", "Ünïque/1")["model_name"] == "Ünïque/1"


@pytest.mark.parametrize("flags", [("--host", "a,b,c,d"), ("--host", "a,"), ("--model-name", "")])
def test_what_cannot_be_meant_is_one_line(planned, flags):
    err = planned(*flags)
    assert err.startswith("pipeline-orch: error: ")
    assert len(err.splitlines()) == 1


def test_noise_is_planned_with_the_length_that_it_is_for(planned):
    flags = ("--split", "client", "--dp-sigma", "0.03", "--dp-clip", "7.5")
    assert planned(*flags)["dp"] == {"sigma": 0.03, "clip": 7.5}
    assert "dp" not in planned("--split", "client")
    assert "go together" in planned("--split", "client", "--dp-sigma", "0.03")
    assert "go together" in planned("--split", "client", "--dp-clip", "1")
    assert "dp is for manifests whose split is client" in planned(*flags[2:])
    for value in ("0", "-1", "nan", "inf"):
        assert "dp.sigma" in planned(*flags[:3], value, *flags[4:])


def test_memory_for_keys_and_values_is_in_the_manifest_where_it_is_given(planned):
    assert [each["kv_bytes"] for each in planned("--kv-memory", "0.5")["stages"]] == [1 << 29] * 2
    assert all("kv_bytes" not in each for each in planned()["stages"])


@pytest.mark.parametrize("value", ["", "x", "1,2,3", "-1", "1,", "nan", "1e3", "\u0663"])
def test_machines_of_no_known_memory_are_refused_in_one_line(planned, value):
    err = planned("--memory", value)
    assert err.startswith("pipeline-orch: error: --memory")
    assert len(err.splitlines()) == 1


def test_a_machine_too_small_for_its_stage_is_warned_of(tiny_model, monkeypatch, capfd):
    command = ["plan", "--model-dir", str(tiny_model), "--stages", "2", "--host", "a,b"]
    monkeypatch.setattr(sys, "argv", ["pipeline-orch", *command, "--memory", "0.000001,8"])
    with pytest.raises(SystemExit) as caught:
        pipeline_orch.main()
    assert not caught.value.code
    first, second = capfd.readouterr().err.splitlines()
    assert "stage 0" in first
    assert "too small" in first
    assert "tokens" in second
