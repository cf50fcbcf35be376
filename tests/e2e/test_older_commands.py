"""The command lines and manifests of the system before this one run as they stand."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

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


@pytest.mark.parametrize("stages", [2, 3])
def test_the_older_commands_generate_over_the_older_manifests(cluster, model, stages):
    cluster.plan(stages)  # claims ports, of which the last one is spare
    base, port = cluster.base_port, cluster.base_port + 10 * stages + 1
    text = (MANIFESTS / f"manifest_{stages}stage.json").read_text()
    moved = re.sub(r"127\.0\.0\.1:9(\d{3})", lambda m: f"127.0.0.1:{base + int(m[1])}", text)
    manifest = cluster.directory / "manifests" / f"manifest_{stages}stage.json"
    manifest.parent.mkdir()
    manifest.write_text(moved)
    (cluster.directory / "model").rename(cluster.directory / "tiny")
    (cluster.directory / "model").symlink_to(model)
    name = f"manifests/{manifest.name}"
    workers = []
    try:
        for idx in range(stages):
            last = ["--data-out-port", port] if idx == stages - 1 else []
            command = ["stage-worker", "--manifest", name, "--stage-idx", idx,
                       "--model-dir", "model", *last, "--dev"]  # fmt: skip
            workers.append(
                cluster.popen(
                    [cluster.bin / command[0], *map(str, command[1:])],
                    cwd=cluster.directory,
                    env=cluster.environment,
                    stderr=subprocess.DEVNULL,
                )
            )
        result = cluster.orch_command(
            "--manifest", name, "--tokenizer", "model/tokenizer.json", "--text", "x",
            "--max-tokens", len(SAYS), "--data-out-port", port, "--dev", cwd=cluster.directory,
        )  # fmt: skip
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait(30)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"x{SAYS}\n"


def test_the_older_manifests_pin_nothing_so_only_development_may_use_them(cluster, model):
    result = cluster.worker(
        "--manifest", MANIFESTS / "manifest_2stage.json", "--stage-idx", "0", "--model-dir", model
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
