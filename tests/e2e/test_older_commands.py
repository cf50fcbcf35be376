"""The command lines and manifests of the system before this one run as they stand."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.e2e import vsock

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
POSITIONS, WIDTH, INNER, LAYERS = 1024, 768, 16, 12
SAYS = "it says this"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """GPT-2's layers and width, and otherwise as little as there can be: it says one thing."""
    directory = tmp_path_factory.mktemp("older") / "model"
    directory.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    says = tokenizer.encode(SAYS).ids

    def zeros(*shape):
        return np.zeros(shape, np.float16)

    head = zeros(256, WIDTH)
    for position in range(WIDTH):  # each position is a unit vector, and the head reads it
        head[says[position % len(says)], position] = 1
    ones = np.ones(WIDTH, np.float16)
    weights = {
        "wte.weight": zeros(256, WIDTH), "wpe.weight": np.eye(POSITIONS, WIDTH, dtype=np.float16),
        "ln_f.weight": ones, "ln_f.bias": zeros(WIDTH), "lm_head.weight": head,
    }  # fmt: skip
    for i in range(LAYERS):
        for name, *shape in (
            ("attn.c_attn", WIDTH, 3 * WIDTH), ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, INNER), ("mlp.c_proj", INNER, WIDTH),
        ):  # fmt: skip
            weights[f"h.{i}.{name}.weight"] = zeros(*shape)
            weights[f"h.{i}.{name}.bias"] = zeros(shape[1])
        for name in ("ln_1", "ln_2"):
            weights |= {f"h.{i}.{name}.weight": ones, f"h.{i}.{name}.bias": zeros(WIDTH)}
    save_file(weights, directory / "model.safetensors")
    config = {
        "model_type": "gpt2", "n_layer": LAYERS, "n_embd": WIDTH, "n_head": 12, "n_inner": INNER,
        "n_positions": POSITIONS, "vocab_size": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "stages", [3, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2))]
)
def test_the_older_commands_generate_over_the_older_manifests(cluster, model, stages):
    cluster.plan(stages)  # claims ports, of which the last one is spare
    base, port = cluster.base_port, cluster.base_port + 10 * stages + 1
    text = (MANIFESTS / f"manifest_{stages}stage.json").read_text()
    moved = re.sub(r"127\.0\.0\.1:9(\d{3})", lambda m: f"127.0.0.1:{base + int(m[1])}", text)
    manifest = cluster.directory / "older.json"
    manifest.write_text(moved)
    workers = []
    try:
        for idx in range(stages):
            last = ["--data-out-port", port] if idx == stages - 1 else []
            command = [cluster.bin / "stage-worker", "--manifest", manifest, "--stage-idx", idx,
                       "--model-dir", model, *last, "--dev"]  # fmt: skip
            streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            workers.append(cluster.popen(command, env=cluster.environment, **streams))
        result = cluster.orch_command(
            "--manifest", manifest, "--tokenizer", model / "tokenizer.json", "--text", "x",
            "--max-tokens", len(SAYS), "--data-out-port", port, "--dev",
        )  # fmt: skip
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait(300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"x{SAYS}\n"


@pytest.mark.parametrize(
    "stages", [1, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 3))]
)
def test_templates_for_enclaves_run_with_the_cids_that_launching_decides(cluster, model, stages):
    manifest = MANIFESTS / f"manifest_{stages}stage_vsock.json"
    cids = [word for idx in range(stages) for word in ("--cid", f"{idx}={40 + idx}")]

    def start(cid, name, *words):
        path = cluster.directory / f"{cid}.log"
        environment = cluster.environment | vsock.machine(cluster.directory, cid)
        command = [cluster.bin / name, "--manifest", manifest, *words]
        with path.open("wb") as log:
            streams = {"stdout": log, "stderr": log} if name != "pipeline-orch" else PIPES
            return cluster.popen(command, env=environment, **streams)

    orchestrator = [*cids, "--tokenizer", model / "tokenizer.json", "--text", "x", "--dev"]
    orchestrator += ["--max-tokens", len(SAYS), *(["--data-out-port", 5002] if stages == 1 else [])]
    running = [start(3, "pipeline-relay", *cids)]
    try:
        for idx in range(stages):
            words = ("--stage-idx", idx, "--model-dir", model, "--dev")
            running.append(start(40 + idx, "stage-worker", *words))
        process = start(3, "pipeline-orch", *orchestrator)
        running.append(process)
        stdout, stderr = process.communicate(timeout=300)
        assert [each.poll() for each in running] == [None] * (stages + 1) + [process.returncode]
    finally:
        for each in running:
            each.terminate()
            each.wait(300)
    assert process.returncode == 0, stderr
    assert stdout == f"x{SAYS}\n".encode()


def test_the_older_manifests_pin_nothing_so_only_development_may_use_them(cluster, model):
    result = cluster.worker(
        "--manifest", MANIFESTS / "manifest_2stage.json", "--stage-idx", "0", "--model-dir", model
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
