"""Packed weights that cannot be what they say they are are refused in one line."""

import pytest
import torch

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from tests.pipeline.weights.test_packings import AWQ, GPTQ, SHAPE, Packed, compressed, logits


@pytest.fixture
def packed(tmp_path):
    return lambda kind: Packed(tmp_path, kind)


@pytest.mark.parametrize(
    ("kind", "part", "at"),
    [("awq", "scales", 0), ("gptq", "qzeros", 1), ("w4a16", "weight_packed", 1)],
)
def test_tensors_that_do_not_fit_each_other_are_refused(packed, kind, part, at):
    model = packed(kind)

    def shorten(tensors: dict) -> None:
        name = f"model.layers.1.mlp.up_proj.{part}"
        tensors[name] = tensors[name].narrow(at, 0, tensors[name].shape[at] - 1).contiguous()

    model.rewrite(shorten)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        logits(model.directory)


@pytest.mark.parametrize(
    ("kind", "part", "words"),
    [
        *(
            (kind, part, "F32, and it may be I32")
            for kind, part in (
                ("gptq act-order", "g_idx"), ("gptq", "qzeros"), ("awq", "qzeros"),
                ("w4a16 act-order", "weight_g_idx"), ("w4a16", "weight_shape"),
            )
        ),
        ("awq", "scales", "I32, and it may be F32"),
        ("w8a8 of channels", "weight_scale", "I32, and it may be F32"),
    ],
)  # fmt: skip
def test_parts_of_a_type_that_they_cannot_be_of_are_refused(packed, kind, part, words):
    model = packed(kind)
    name = f"model.layers.0.mlp.up_proj.{part}"
    other = torch.float32 if words.startswith("F32") else torch.int32
    model.rewrite(lambda tensors: tensors.update({name: tensors[name].to(other)}))
    with pytest.raises(ModelError, match=f"has {part} of {words}"):
        logits(model.directory)


def test_groups_that_there_are_not_are_refused(packed):
    model = packed("gptq act-order")

    def point_beyond(tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.g_idx"][5] = 1 << 20

    model.rewrite(point_beyond)
    with pytest.raises(ModelError, match="inputs of group 1048576, and there are 4"):
        logits(model.directory)


def test_a_part_that_is_missing_is_named(packed):
    model = packed("awq")
    model.rewrite(lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.scales"))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        logits(model.directory)


def test_scales_rewritten_between_two_reads_are_found_out(packed, monkeypatch):
    """A host that shows other scales first, and what was hashed afterwards, changes nothing."""
    from pipeline.weights import unpacking

    model = packed("awq")
    read = unpacking._read

    def other(path, stored):
        found = read(path, stored).copy()
        found.reshape(-1)[0] += 1
        return found

    monkeypatch.setattr(unpacking, "_read", other)
    with pytest.raises(ModelError, match="changed while it was read"):
        logits(model.directory)


REFUSED = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "'bitsandbytes nf4' weights are not supported: awq, gptq, compressed-tensors and mxfp4 are",
    ),
    "another": ({"quant_method": "fp8"}, "'fp8' weights are not supported"),
    "awq gemv": (AWQ | {"version": "gemv"}, "version 'gemv'"),
    "awq of 3 bits": (AWQ | {"bits": 3}, "awq of 3 bits"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "'marlin'"),
    "floats": (compressed("float-quantized", num_bits=8, type="float"), "'float-quantized'"),
    "a group of nothing": (AWQ | {"group_size": 0}, "group_size: 0"),
    "no bits": ({"quant_method": "awq"}, "bits: Field required"),
    "nothing": ("x", "it is no object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_packings_are_refused_by_name_in_one_line(packed, name):
    fields, message = REFUSED[name]
    model = packed("awq")
    model.change(quantization_config=fields)
    with pytest.raises(ModelError, match=message) as caught:
        load_config(model.directory)
    assert "quantization_config" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_packed_weights_are_not_rotated(packed, tmp_path):
    from pipeline.codecs.secret_rotation import SecretRotation

    model = packed("awq")
    rotation = SecretRotation(bytes(32), SHAPE["hidden_size"])
    manifest = plan(model.directory, PlanOptions(1, split="client"))
    with pytest.raises(ModelError, match="packed in a few bits, which a rotation would undo"):
        cut_model(manifest, model.directory, tmp_path / "cut", rotation=rotation)
