"""No pipeline is opened in a mode without a leakage card."""

import sys

import pytest

from pipeline.cli import pipeline_orch
from pipeline.cli.pipeline_access import mode_of
from pipeline.leakage import cards
from pipeline.planning.plan import PlanOptions, plan
from transport.dial_and_listen import TcpEndpoint

FINGERPRINT = "ab" * 32


@pytest.mark.parametrize(
    ("split", "wire", "rotation", "name"),
    [
        ("stages", "F32", None, "plain"),
        ("stages", "I8", None, "plain"),
        ("client", "F32", None, "client"),
        ("client", "I8", None, "client"),
        ("client", "F32", FINGERPRINT, "rotate"),
        ("client", "I8", FINGERPRINT, "rotate-int8"),
    ],
)
def test_a_manifest_says_which_mode_it_is(tiny_model, split, wire, rotation, name):
    manifest = plan(tiny_model, PlanOptions(2, split=split, wire_dtype=wire))
    assert mode_of(manifest.model_copy(update={"rotation": rotation})) == name


@pytest.mark.parametrize(
    ("kind", "name"), [("attention", "scx"), ("linear", "offload"), ("mixed-linear", "mix")]
)
def test_what_another_worker_is_asked_for_is_a_mode(tiny_model, kind, name):
    part = (kind, TcpEndpoint("127.0.0.1", 9), None)
    assert mode_of(plan(tiny_model, PlanOptions(1, part=part))) == name


def test_noise_is_a_mode_whatever_else_is_done(tiny_model):
    manifest = plan(tiny_model, PlanOptions(2, split="client", noise=(0.1, 7.5)))
    assert mode_of(manifest) == "dp"
    assert mode_of(manifest.model_copy(update={"rotation": FINGERPRINT})) == "dp"


def test_a_mode_without_a_card_is_refused_before_anything_is_dialed(
    tiny_model, tmp_path, monkeypatch, capfd
):
    def orch(*words):
        monkeypatch.setattr(sys, "argv", ["pipeline-orch", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        return caught.value.code, capfd.readouterr().err

    path = tmp_path / "plan.json"
    assert orch("plan", "--model-dir", tiny_model, "--stages", "2", "-o", path)[0] == 0
    (tmp_path / "cards").mkdir()
    monkeypatch.setattr(cards, "files", lambda package: tmp_path)
    code, err = orch(
        "--manifest", path, "--tokenizer", tiny_model / "tokenizer.json", "--text", "Hi", "--dev",
        "--connect-timeout", "1",
    )  # fmt: skip
    assert code == 2
    assert "mode plain has no leakage card" in err.splitlines()[-1]
