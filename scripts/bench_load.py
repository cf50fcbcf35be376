"""Seconds until a stage's weights are there, beside hashing the same bytes, interleaved.

Usage: bench_load.py [--layers N] [--rounds N] [--threads 1,2] [--rows NAME,...] [--dir DIR]
                     [--tokenizer FILE]

A Llama shape of random weights (22 layers: 1.17 G parameters) is written once, 4.7 GB in float32,
and removed at the end. A row of the table is a file in one precision, kept in another by a stage
that holds the whole model; its last are those of the commands that prepare a shard. Each round
hashes the file with hashlib, starts the stage and waits until it listens; `load` is what the stage
says its weights took, `ready` the whole time since its start. Rows cold-start and cold-shards are
of GPT-2's 124 M shape in float32: from starting two stages and an orchestrator, three commands,
until the second token, where each stage reads its part of one file, and where it reads its shard;
rows supervised-start and supervised-shards of the one command that starts the stages itself.
Medians of the rounds, page cache warm, bytecode there as scripts/setup.sh leaves it.
"""

import hashlib
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from command_line import Parser, run_main, whole, wholes

from pipeline.dtypes import STORED_DTYPES, from_floats
from pipeline.errors import InputError
from pipeline.planning.part_weights import save_tensors

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SHAPE = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
KEPT = {"F32": ("float32",), "BF16": ("bfloat16", "float32", "int8")}
BIN = Path(sys.executable).parent
PORT = 23650
ROOT = Path(__file__).parents[1]
LOADED = re.compile(r"event=weights_loaded .*seconds=([0-9.]+)")


def write_model(directory: Path, num_layers: int, stored: str) -> None:
    """One layer's random numbers, in every layer."""
    random = np.random.Generator(np.random.Philox(20240))
    hidden, inner, vocab = (SHAPE[f"{k}_size"] for k in ("hidden", "intermediate", "vocab"))
    kv = hidden // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]

    def normal(*shape: int) -> np.ndarray:
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        return from_floats(values, STORED_DTYPES[stored])

    def ones() -> np.ndarray:
        return from_floats(np.ones(hidden, np.float32), STORED_DTYPES[stored])

    layer = {
        "self_attn.q_proj.weight": normal(hidden, hidden),
        "self_attn.k_proj.weight": normal(kv, hidden),
        "self_attn.v_proj.weight": normal(kv, hidden),
        "self_attn.o_proj.weight": normal(hidden, hidden),
        "mlp.gate_proj.weight": normal(inner, hidden),
        "mlp.up_proj.weight": normal(inner, hidden),
        "mlp.down_proj.weight": normal(hidden, inner),
        "input_layernorm.weight": ones(),
        "post_attention_layernorm.weight": ones(),
    }
    tensors = {
        f"model.layers.{i}.{name}": value
        for i in range(num_layers)
        for name, value in layer.items()
    }
    tensors |= {
        "model.embed_tokens.weight": normal(vocab, hidden),
        "lm_head.weight": normal(vocab, hidden),
        "model.norm.weight": ones(),
    }
    directory.mkdir()
    save_tensors(tensors, directory / "model.safetensors")
    config = {**SHAPE, "num_hidden_layers": num_layers}
    (directory / "config.json").write_text(json.dumps(config))


def write_gpt2(directory: Path) -> None:
    """A model of GPT-2's smallest shape, of random numbers."""
    random = np.random.Generator(np.random.Philox(20240))
    hidden, vocab = GPT2_SHAPE["n_embd"], GPT2_SHAPE["vocab_size"]

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    tensors = {"wte": normal(vocab, hidden), "wpe": normal(GPT2_SHAPE["n_positions"], hidden)}
    tensors = {f"{name}.weight": value for name, value in tensors.items()}
    norms = ["ln_f"]
    for layer in (f"h.{i}" for i in range(GPT2_SHAPE["n_layer"])):
        norms += [f"{layer}.ln_1", f"{layer}.ln_2"]
        for name, num_in, num_out in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            tensors[f"{layer}.{name}.weight"] = normal(num_in, num_out)
            tensors[f"{layer}.{name}.bias"] = normal(num_out)
    for name in norms:
        tensors[f"{name}.weight"] = np.ones(hidden, np.float32)
        tensors[f"{name}.bias"] = np.zeros(hidden, np.float32)
    directory.mkdir()
    save_tensors(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(GPT2_SHAPE))


def run(*command: object) -> None:
    command = [str(each) for each in command]
    result = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        raise InputError(result.stderr.strip().splitlines()[-1])


def hash_seconds(path: Path) -> float:
    """hashlib over the file, what it reads not counted."""
    block, seconds = memoryview(bytearray(1 << 20)), 0.0
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            started = time.perf_counter()
            digest.update(block[:count])
            seconds += time.perf_counter() - started
    return seconds


def manifest_of(directory: Path) -> Path:
    """As `shard` wrote it there, or `plan`."""
    manifest = directory / "manifest.json"
    return manifest if manifest.exists() else directory / "plan.json"


def worker(directory: Path, stage_idx: int, kept: str, threads: int) -> list[object]:
    prepared = directory / f"stage{stage_idx}"
    return [
        BIN / "stage-worker", "--manifest", manifest_of(directory), "--stage-idx", stage_idx,
        "--model-dir", prepared if prepared.is_dir() else directory, "--dtype", kept,
        "--threads", threads, "--dev",
    ]  # fmt: skip


def load(directory: Path, kept: str, threads: int) -> tuple[float, float]:
    """Seconds of a stage's weights, and until it listens."""
    command = [*worker(directory, 0, kept, threads), "--kv-memory", 0.1]
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    found, lines = None, []
    try:
        for line in process.stdout:
            lines.append(line)
            found = LOADED.search(line) or found
            if "event=listening" in line:
                return float(found[1]), time.perf_counter() - started
    finally:
        process.kill()
        process.communicate()
    raise InputError(f"the stage did not come up: {''.join(lines)[-300:]}")


def shard(directory: Path, out: Path, *flags: object) -> tuple[float, float]:
    """Seconds of `pipeline-orch shard`, twice."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    run(
        BIN / "pipeline-orch", "shard", "--manifest", directory / "plan.json",
        "--model-dir", directory, "--out", out, *flags,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    return seconds, seconds


def cold_start(
    directory: Path, tokenizer: Path, threads: int, *, supervised: bool = False
) -> tuple[float, float]:
    """Seconds from starting two stages and an orchestrator to the second token, twice."""
    generate = [
        BIN / "pipeline-orch", "--manifest", manifest_of(directory), "--dev", "--tokenizer",
        tokenizer, "--text", "One and two", "--max-tokens", 2, "--ignore-eos", "--verbose",
    ]  # fmt: skip
    if supervised:
        generate += ["--supervise", "--model-dir", directory, "--dtype", "float32"]
        commands = [[*generate, "--threads", threads]]
    else:
        stages = [worker(directory, idx, "float32", threads) for idx in (0, 1)]
        commands = [*([*stage, "--once", "--quiet"] for stage in stages), generate]
    started = time.perf_counter()
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if command is commands[-1] else subprocess.DEVNULL,
            text=True,
        )
        for command in commands
    ]
    lines = []
    try:
        for line in processes[-1].stderr:
            lines.append(line)
            if "event=token n=2" in line:
                seconds = time.perf_counter() - started
                return seconds, seconds
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    raise InputError(f"there was no second token: {''.join(lines)[-300:]}")


@dataclass
class Row:
    name: str
    file: Path
    measure: Callable[[int], tuple[float, float]]


def plan(model: Path, stages: int) -> None:
    run(
        BIN / "pipeline-orch", "plan", "--model-dir", model, "--stages", stages, "--base-port",
        PORT, "-o", model / "plan.json",
    )  # fmt: skip


def rows_of(directory: Path, layers: int, wanted: list[str] | None, tokenizer: Path) -> list[Row]:
    """What there is to measure; writes the models."""
    rows = []

    def add(name: str, file: Path, measure: Callable[[int], tuple[float, float]]) -> None:
        if wanted is None or name in wanted:
            rows.append(Row(name, file, measure))

    for stored, kept in KEPT.items():
        names = [f"{stored.lower()}-{precision}" for precision in kept]
        prepares = stored == "BF16" and (wanted is None or {"i8-int8", "shard"} & {*wanted})
        if not prepares and wanted is not None and not {*names} & {*wanted}:
            continue
        model = directory / stored
        write_model(model, layers, stored)
        plan(model, 1)
        file = model / "model.safetensors"
        for name, precision in zip(names, kept, strict=True):
            add(name, file, lambda n, model=model, kept=precision: load(model, kept, n))
        if prepares:
            prepared = directory / "I8"
            shard(model, prepared, "--dtype", "int8")
            add(
                "i8-int8",
                prepared / "stage0" / file.name,
                lambda n, at=prepared: load(at, "int8", n),
            )
            add(
                "shard",
                file,
                lambda _, model=model: shard(model, directory / "out", "--dtype", "int8"),
            )
    starts = {"cold-start", "cold-shards", "supervised-start", "supervised-shards"}
    if wanted is None or starts & {*wanted}:
        gpt2, shards = directory / "gpt2", directory / "gpt2-shards"
        write_gpt2(gpt2)
        plan(gpt2, 2)
        shard(gpt2, shards)
        for suffix, model, file in (
            ("start", gpt2, gpt2 / "model.safetensors"),
            ("shards", shards, shards / "stage0" / "model.safetensors"),
        ):
            start = partial(cold_start, model, tokenizer)
            add(f"cold-{suffix}", file, start)
            add(f"supervised-{suffix}", file, partial(start, supervised=True))
    return rows


def report(rows: list[Row], rounds: int, threads: list[int]) -> None:
    print(
        "file → kept          GB   hash s  "
        + "".join(f"{n} threads: load ready   x hash  " for n in threads)
    )
    for row in rows:
        hashes: list[float] = []
        found: dict[int, list[tuple[float, float]]] = {n: [] for n in threads}
        for _ in range(rounds):
            hashes.append(hash_seconds(row.file))
            for n in threads:
                found[n].append(row.measure(n))
        hashing = statistics.median(hashes)
        line = f"{row.name:18} {row.file.stat().st_size / 1e9:5.2f} {hashing:8.2f}  "
        for n in threads:
            load_s, ready_s = (statistics.median(each) for each in zip(*found[n], strict=True))
            line += f"{load_s:15.2f} {ready_s:5.2f} {load_s / hashing:8.2f}  "
        print(line, flush=True)


def main() -> None:
    parser = Parser(prog="bench_load", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=whole(1), default=22)
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--threads", type=wholes(1), default="1,2")
    parser.add_argument("--rows", type=lambda text: text.split(","))
    parser.add_argument("--dir", type=Path, help="where the models are written [a temporary one]")
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "models" / "smollm2" / "tokenizer.json"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is written goes then, too
    directory = Path(tempfile.mkdtemp(dir=args.dir, prefix="bench_load."))
    try:
        report(
            rows_of(directory, args.layers, args.rows, args.tokenizer), args.rounds, args.threads
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    run_main("bench_load", main)
