"""The example manifests load, and say what their names say."""

from pathlib import Path

import pytest

from pipeline.agreement.manifest import load_manifest
from pipeline.models.config import load_config
from pipeline.planning.plan import FIRST_CID, PlanOptions, plan
from pipeline.planning.shard import _enclave_command
from transport.dial_and_listen import TcpEndpoint
from transport.relay_manifest import manifest_maps

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "manifests").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_has_the_stages_of_its_name(path):
    model, _, rest = path.stem.partition("_")
    manifest = load_manifest(path)
    assert manifest.model_name == {"manifest": "gpt2"}.get(model, model)
    assert len(manifest.stages) == int(rest[0])
    if not path.stem.endswith("_vsock"):  # there, the parent's relay stands between two stages
        for stage, after in zip(manifest.stages, manifest.stages[1:], strict=False):
            assert stage.endpoint.data_out == after.endpoint.data_in


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_relay_of_a_parent_carries_every_channel_of_a_vsock_example(stages):
    path = ROOT / "manifests" / f"smollm2_{stages}stage_vsock.json"
    manifest = load_manifest(path)
    maps = {
        str(each.listen): str(each.target)
        for each in manifest_maps(path, "127.0.0.1", TcpEndpoint("user", 9100), 8)
    }
    assert len(maps) == 2 * stages + 1
    for stage in manifest.stages:
        run = _enclave_command(stage)
        control, data = (
            run[run.index(name) + 1].replace("any", str(FIRST_CID + stage.stage_idx))
            for name in ("--control-listen", "--data-in-listen")
        )
        assert maps[str(stage.endpoint.control.to_endpoint())] == control
        if stage.stage_idx == 0:
            assert maps[str(stage.endpoint.data_in.to_endpoint())] == data
        else:
            before = manifest.endpoint(stage.stage_idx - 1).data_out.to_endpoint()
            assert maps[str(before)] == data == str(stage.endpoint.data_in.to_endpoint())
    assert maps[str(manifest.endpoint(stages - 1).data_out.to_endpoint())] == "tcp:user:9100"


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
    in_enclaves = load_manifest(ROOT / "manifests" / f"smollm2_{stages}stage_vsock.json")
    assert in_enclaves == plan(model_dir, PlanOptions(stages, in_enclaves=True))
    assert example.total_layers == load_config(model_dir).num_layers
