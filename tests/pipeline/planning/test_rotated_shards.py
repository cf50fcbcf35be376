"""Cutting a model into rotated shards: one secret for all, pinned, and nothing by halves."""

import json
import stat
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.agreement.manifest import load_manifest, parse_manifest
from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.errors import InputError, ManifestError, ModelError
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS
from pipeline.models.families import FAMILIES
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model, cut_stage
from tests.pipeline.oracles import make_oracle  # noqa: F401 - a fixture

ROTATION = SecretRotation(bytes(range(32)), 64)
OTHER = SecretRotation(bytes(range(1, 33)), 64)


@pytest.fixture(params=["gpt2", "llama-tied-llama3-rope"])
def source(request):
    return request.getfixturevalue("make_oracle")(request.param).directory


@pytest.fixture
def planned(source):
    return plan(source, PlanOptions(2, split="client"))


def hashes(manifest):
    return [*(stage.weight_hashes for stage in manifest.stages), manifest.client.weight_hashes]


def test_every_part_names_the_rotation_and_the_manifest_pins_it(source, planned, tmp_path):
    pinned = cut_model(planned, source, tmp_path / "out", rotation=ROTATION)
    assert pinned.rotation == ROTATION.fingerprint
    assert load_manifest(tmp_path / "out" / "manifest.json") == pinned
    assert pinned.core()["rotation"] == ROTATION.fingerprint
    for part in ("stage0", "stage1", "client"):
        config = load_config(tmp_path / "out" / part, pinned.config_hash)
        assert config.rotation == ROTATION.fingerprint
    core = json.loads((tmp_path / "out" / "stage0" / "manifest.json").read_text())
    assert core == pinned.core()


def test_the_same_secret_writes_the_same_bytes_and_another_secret_others(source, planned, tmp_path):
    cuts = [
        cut_model(planned, source, tmp_path / str(index), rotation=rotation)
        for index, rotation in enumerate([ROTATION, ROTATION, OTHER, None])
    ]
    assert cuts[0] == cuts[1]
    for other in cuts[2:]:
        assert all(a != b for a, b in zip(hashes(cuts[0]), hashes(other), strict=True))
        assert other.core_hash() != cuts[0].core_hash()


def test_no_matrix_of_a_stage_is_one_of_the_checkpoints(source, planned, tmp_path):
    """Nor a row of one, where the stream is read; and every norm's gain is one."""
    whole = load_file(source / "model.safetensors")
    cut_model(planned, source, tmp_path / "out", rotation=ROTATION)
    for part in ("stage0", "stage1", "client"):
        tensors = load_file(tmp_path / "out" / part / "model.safetensors")
        for name, tensor in tensors.items():
            plain = whole.get(name, whole.get(f"transformer.{name}"))
            if tensor.ndim == 2:
                assert plain is None or not np.isclose(tensor, plain).all(axis=1).any()
            elif name.endswith("weight"):
                assert (tensor == 1).all()


def test_only_its_owner_reads_the_part_that_gives_the_secret_away(source, planned, tmp_path):
    cut_model(planned, source, tmp_path / "out", rotation=ROTATION)
    assert stat.S_IMODE((tmp_path / "out" / "client").stat().st_mode) == 0o700


def test_a_stage_is_cut_again_from_the_same_secret_alone(source, planned, tmp_path):
    pinned = cut_model(planned, source, tmp_path / "out", rotation=ROTATION)
    cut_stage(pinned, 1, source, tmp_path / "again", rotation=ROTATION)
    for name in ("model.safetensors", "config.json", "manifest.json"):
        again, first = (tmp_path / where / name for where in ("again", "out/stage1"))
        assert again.read_bytes() == first.read_bytes()
    for rotation, problem in ((OTHER, "another secret"), (None, "give it with --rotate-secret")):
        with pytest.raises(InputError, match=problem):
            cut_stage(pinned, 1, source, tmp_path / "no", rotation=rotation)
    plain = cut_model(planned, source, tmp_path / "plain")
    with pytest.raises(InputError, match="not rotated, and a secret is given"):
        cut_stage(plain, 1, source, tmp_path / "no", rotation=ROTATION)
    assert not (tmp_path / "no").exists()


def test_the_source_is_held_against_its_hashes(source, planned, tmp_path):
    first = planned.stage(0).model_copy(update={"weight_hashes": ("0" * 64,)})
    changed = planned.model_copy(update={"stages": (first, planned.stage(1))})
    with pytest.raises(ModelError, match="SHA-256"):
        cut_model(changed, source, tmp_path / "out", rotation=ROTATION)
    assert not (tmp_path / "out").exists()


def test_what_is_not_to_be_rotated_is_refused(source, planned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="split is client"):
        cut_model(plan(source, PlanOptions(2)), source, out, rotation=ROTATION)
    pinned = cut_model(planned, source, tmp_path / "cut", rotation=ROTATION)
    for rotation in (ROTATION, None):
        with pytest.raises(InputError, match="of rotated shards"):
            cut_model(pinned, source, out, rotation=rotation)
    for name, family in FAMILIES.items():
        monkeypatch.setitem(FAMILIES, name, replace(family, stream=None))
    with pytest.raises(ModelError, match="cannot be rotated"):
        cut_model(planned, source, out, rotation=ROTATION)
    assert not out.exists()


def test_whoever_has_the_plain_weights_finds_the_rotation(request, tmp_path):
    """What README.md says of it, so that nobody takes it for more."""
    source = request.getfixturevalue("make_oracle")("llama-tied-llama3-rope").directory
    cut_model(
        plan(source, PlanOptions(1, split="client")), source, tmp_path / "out", rotation=ROTATION
    )
    plain = load_file(source / "model.safetensors")
    seen = load_file(tmp_path / "out" / "stage0" / "model.safetensors")
    layer = "model.layers.0."
    gain = plain[layer + "post_attention_layernorm.weight"]
    known = plain[layer + "mlp.gate_proj.weight"] * gain
    found = np.linalg.lstsq(known, seen[layer + "mlp.gate_proj.weight"])[0]
    assert abs(found - ROTATION.apply(np.eye(64))).max() < 1e-4


def test_the_older_layout_of_a_clients_part_is_rotated_too(source, planned, tmp_path):
    logits = []
    for in_one_file in (False, True):
        out = tmp_path / str(in_one_file)
        pinned = cut_model(planned, source, out, rotation=ROTATION, in_one_file=in_one_file)
        weights = out / "client" / "client_weights.safetensors" if in_one_file else out / "client"
        shard = load_shard(
            weights, load_config(out / "client"), 0, 0, ends=BOTH_ENDS,
            expected_hashes=pinned.client.weight_hashes,
        )  # fmt: skip
        rows = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
        logits += shard.kernels.to_host(shard.logits(shard.kernels.to_device(rows)))
    np.testing.assert_array_equal(*logits)


def test_a_manifest_of_rotated_stages_that_embed_tokens_is_refused(request):
    plain = plan(request.getfixturevalue("make_oracle")("gpt2").directory, PlanOptions(1))
    raw = plain.model_dump(mode="json") | {"rotation": "0" * 64}
    del raw["client"]
    with pytest.raises(ManifestError, match="rotation is for manifests whose split is client"):
        parse_manifest(json.dumps(raw))


def test_a_plain_manifests_core_is_what_it_was_before_there_were_rotations(request):
    assert (
        "rotation"
        not in plan(request.getfixturevalue("make_oracle")("gpt2").directory, PlanOptions(1)).core()
    )
