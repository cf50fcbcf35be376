"""What a stage is reckoned to take, by its configuration alone, is what it takes."""

import numpy as np
import pytest

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.planning.stage_sizes import stage_sizes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_and_caches_are_those_of_loaded_stages(tiny_model, precision):
    manifest = plan(tiny_model, PlanOptions(num_stages=2, precision=precision))
    for stage in manifest.stages:
        layers = (stage.layer_start, stage.layer_end)
        shard = load_shard(
            tiny_model, load_config(tiny_model), *layers,
            dtype=precision, kernels="torch", expected_hashes=None,
        )  # fmt: skip
        found = stage_sizes(manifest, stage.stage_idx, tiny_model, 3, 100)
        # torch's kernels hold matrices in float32, whatever the precision.
        assert found.weights <= shard.num_weight_bytes <= found.widest_weights
        assert (found.weights == found.widest_weights) == (precision == "float32")
        sent_on = 0 if stage.stage_idx else np.empty((3, 100, 64), np.float32).nbytes
        assert found.session == shard.kv_bytes(3, 100) + sent_on
        assert found.steps > 0


def test_a_part_of_the_model_is_enough_and_so_is_its_configuration(tiny_model, tmp_path):
    planned = plan(tiny_model, PlanOptions(num_stages=2))
    cut = cut_model(planned, tiny_model, tmp_path / "parts")
    for idx in range(2):
        part = tmp_path / "parts" / f"stage{idx}"
        (part / "model.safetensors").unlink()
        assert stage_sizes(cut, idx, part, 1, 64) == stage_sizes(planned, idx, tiny_model, 1, 64)


def test_the_ends_count_where_they_are(tiny_model):
    def weights(split):
        manifest = plan(tiny_model, PlanOptions(num_stages=1, split=split))
        return stage_sizes(manifest, 0, tiny_model, 1, 64).weights

    assert weights("stages") - weights("client") >= 2 * 256 * 64 * 4


def test_another_model_is_refused(tiny_model, tmp_path):
    manifest = plan(tiny_model, PlanOptions(num_stages=1))
    text = (tiny_model / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"rms_norm_eps"', ' "rms_norm_eps"'))
    with pytest.raises(ModelError):
        stage_sizes(manifest, 0, tmp_path, 1, 64)
