"""A whole model in one enclave under QEMU, driven from outside like any pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from enclave import cli, emulator
from pipeline.trust import load_identity

_DIRECTORY = os.environ.get("VEILPIPE_BOOT_TEST")
pytestmark = pytest.mark.skipif(
    _DIRECTORY is None, reason="boots virtual machines: run scripts/test_enclave.sh"
)

_BIN = Path(sys.executable).parent
_TEXT = "Hello there"
_CONTROL, _DATA, _RESULTS = 5000, 5001, 6000

# The orchestrator as it is, but for the root it believes: no option of it can say another.
_ORCHESTRATOR = """
import pathlib, sys
from cryptography import x509
import pipeline.trust
root = x509.load_pem_x509_certificate(pathlib.Path(sys.argv.pop(1)).read_bytes())
pipeline.trust.aws_root = lambda: root
from pipeline.cli.orchestrator import main
main()
"""

Generate = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=255,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def directory() -> Path:
    assert _DIRECTORY is not None
    return Path(_DIRECTORY)


@pytest.fixture(scope="module")
def plan(directory: Path, model: Path) -> dict[str, Any]:
    """The manifest of one stage on this machine, with the orchestrator's key in it."""
    path, identity = directory / "plan.json", directory / "identity.pem"
    subprocess.run([_BIN / "pipeline-orch", "keygen", identity], check=True, timeout=60)
    options = ["--model-dir", model, "--stages", "1", "--base-port", "23450", "-o", path]
    subprocess.run([_BIN / "pipeline-orch", "plan", *options], check=True, timeout=60)
    manifest = json.loads(path.read_text())
    key = load_identity(identity).public_key().public_bytes_raw().hex()
    manifest["orchestrator_keys"] = [key]
    path.write_text(json.dumps(manifest))
    return manifest


@pytest.fixture(scope="module")
def vsock(directory: Path, model: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """The socket of an enclave that serves the stage; manifest.json there pins it."""
    socket = directory / "stage.sock"
    _write_stage(directory / "whole", model, plan)
    addresses = {"control": _CONTROL, "data_in": _DATA, "data_out": _RESULTS}
    endpoint = {
        name: {"type": "unix", "path": str(socket), "port": port}
        for name, port in addresses.items()
    }
    manifest = {**plan, "stages": [{**plan["stages"][0], "endpoint": endpoint}]}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    image = directory / "whole.eif"
    assert cli.main(["build", "--stage-dir", str(directory / "whole"), "-o", str(image)]) == 0
    pinned = ["--manifest", str(directory / "manifest.json"), "--stage", "0"]
    assert cli.main(["pin", str(image), *pinned]) == 0
    machine = emulator.Machine(
        image, socket, directory / "stage.log", signing_dir=directory / "authority"
    )
    with emulator.booted(machine, Path(os.environ["VEILPIPE_CACHE"]) / "tools"):
        yield socket


@pytest.fixture(scope="module")
def generate(directory: Path, model: Path, vsock: Path) -> Generate:
    def run(manifest: Path) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", _ORCHESTRATOR, directory / "authority/root.pem"]
        command += ["--manifest", manifest, "--tokenizer", model / "tokenizer.json"]
        command += ["--text", _TEXT, "--max-tokens", "8", "--ignore-eos"]
        command += ["--identity", directory / "identity.pem", "--connect-timeout", "300"]
        command += ["--data-out-listen", f"unix:{vsock}:{_RESULTS}"]
        return subprocess.run(command, capture_output=True, timeout=400)

    return run


def _write_stage(stage: Path, model: Path, plan: dict[str, Any]) -> None:
    (stage / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, stage / "model" / name)
    left_out = {"endpoint", "expected_measurements"}
    core_stage = {key: value for key, value in plan["stages"][0].items() if key not in left_out}
    (stage / "manifest.json").write_text(json.dumps({**plan, "stages": [core_stage]}))
    anyone = 0xFFFFFFFF
    argv = ["/usr/bin/python3", "-IB", "-c", "from pipeline.cli.stage_worker import main; main()"]
    argv += ["--manifest", "/stage/manifest.json", "--model-dir", "/stage/model"]
    argv += ["--stage-idx", "0", "--control-listen", f"vsock:{anyone}:{_CONTROL}"]
    argv += ["--data-in-listen", f"vsock:{anyone}:{_DATA}", "--data-out-target"]
    run = {"argv": [*argv, f"vsock:2:{_RESULTS}"], "env": {"OMP_NUM_THREADS": "2"}}
    (stage / "run.json").write_text(json.dumps(run))


def _generate_locally(directory: Path, model: Path) -> bytes:
    manifest = ["--manifest", directory / "plan.json", "--dev"]
    environment = {**os.environ, "XDG_DATA_HOME": str(directory), "HOME": str(directory)}
    worker = [_BIN / "stage-worker", *manifest, "--stage-idx", "0", "--model-dir", model]
    with subprocess.Popen(worker, env=environment, stderr=subprocess.DEVNULL) as process:
        command = [_BIN / "pipeline-orch", *manifest, "--tokenizer", model / "tokenizer.json"]
        command += ["--text", _TEXT, "--max-tokens", "8", "--ignore-eos"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=90)
        finally:
            process.terminate()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_enclave_generates_what_an_ordinary_stage_does(
    generate: Generate, directory: Path, model: Path
) -> None:
    attested = generate(directory / "manifest.json")
    assert attested.returncode == 0, attested.stderr
    assert attested.stdout.startswith(_TEXT.encode())
    assert attested.stdout == _generate_locally(directory, model)


@pytest.mark.parametrize("index", ["0", "1", "2"])
def test_enclave_with_another_measurement_than_pinned_gets_nothing(
    generate: Generate, directory: Path, index: str
) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    pcrs = manifest["stages"][0]["expected_measurements"]
    pcrs[index] = f"{int(pcrs[index], 16) ^ 1:096x}"
    (directory / "other.json").write_text(json.dumps(manifest))
    refused = generate(directory / "other.json")
    assert refused.returncode == 1
    assert b"pcrs" in refused.stderr
    assert refused.stdout == b""
