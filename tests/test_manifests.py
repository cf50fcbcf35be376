"""The example manifests load, and say what their names say."""

from pathlib import Path

import pytest

from pipeline.manifest import load_manifest
from pipeline.models.config import load_config
from pipeline.plan import PlanOptions, plan

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "manifests").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_has_the_stages_of_its_name(path):
    model, _, rest = path.stem.partition("_")
    manifest = load_manifest(path)
    assert manifest.model_name == model
    assert len(manifest.stages) == int(rest[0])
    for stage, after in zip(manifest.stages, manifest.stages[1:], strict=False):
        assert stage.endpoint.data_out == after.endpoint.data_in


def test_there_are_examples_for_both_models():
    names = {path.stem for path in EXAMPLES}
    assert names >= {f"{m}_{n}stage" for m in ("smollm2", "gpt2") for n in (1, 2, 3)}


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_smollm2_examples_are_what_plan_writes_for_the_downloaded_model(stages):
    model_dir = ROOT / "models" / "smollm2"
    if not (model_dir / "config.json").exists():
        pytest.skip("models/smollm2 is absent; scripts/download_model.sh fetches it")
    example = load_manifest(ROOT / "manifests" / f"smollm2_{stages}stage.json")
    assert example == plan(model_dir, PlanOptions(stages))
    assert example.total_layers == load_config(model_dir).num_layers
