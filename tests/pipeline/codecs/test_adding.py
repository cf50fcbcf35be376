"""Who follows ADDING.md has a codec that stages speak."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.codecs import base, registry
from pipeline.errors import ManifestError, MessageError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_from_wire, token_ids_to_wire
from pipeline.stage.step_executor import StageCore
from tests.pipeline.pages import written_down

PAGE = Path(base.__file__).with_name("ADDING.md")


@pytest.fixture
def page(monkeypatch):
    monkeypatch.setattr(registry, "CODECS", dict(registry.CODECS))
    registry.make_codec.cache_clear()
    yield written_down(PAGE, "upper")
    registry.make_codec.cache_clear()


def generate(model_dir, manifest):
    """Greedy tokens of the manifest's stages, in this process."""
    config = load_config(model_dir)
    limits = SessionLimits(1, 64, 32, manifest.activation_spec.codec)
    cores = [
        StageCore(
            load_shard(model_dir, config, s.layer_start, s.layer_end, expected_hashes=None), limits
        )
        for s in manifest.stages
    ]
    ids, position, tokens, sent = list(range(40, 49)), 0, [], []
    for step in range(6):
        segment = Segment(0, position, len(ids))
        header = StepHeader(StepKind.STEP, step, (segment,), (Want.TOKEN,), ())
        tensors = (token_ids_to_wire(np.array(ids, np.uint32)),)
        for core in cores:
            tensors = core.step(header, tensors)
            sent.append(tensors[0].spec.dtype.name)
        position += len(ids)
        ids = token_ids_from_wire(tensors[0]).tolist()
        tokens += ids
    return tokens, sent


def test_the_pages_codec_carries_activations_between_stages(page, tiny_model):
    manifest = plan(tiny_model, PlanOptions(2, wire_dtype="UPPER"))
    assert isinstance(manifest.activation_spec.codec, page.Upper)
    tokens, sent = generate(tiny_model, manifest)
    expected, _ = generate(tiny_model, plan(tiny_model, PlanOptions(2)))
    assert tokens == expected
    assert sent == ["BF16", "U32"] * 6


def test_it_loses_what_the_page_says_and_refuses_what_nobody_sends(page):
    codec = page.Upper(8)
    rows = np.random.default_rng(1).standard_normal((5, 8), np.float32)
    found = codec.decode(codec.encode(rows))
    assert (np.abs(found) <= np.abs(rows)).all()
    assert np.abs(found / rows - 1).max() <= 2**-7
    rows[2, 3] = np.inf
    with pytest.raises(MessageError, match="not finite"):
        codec.decode(codec.encode(rows))


def test_without_the_page_no_manifest_names_it(tiny_model):
    with pytest.raises(ManifestError, match="no activations travel as 'UPPER'"):
        plan(tiny_model, PlanOptions(2, wire_dtype="UPPER"))
