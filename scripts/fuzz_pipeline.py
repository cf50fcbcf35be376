"""Fuzz every decoder of the pipeline that is fed by peers or files, with atheris.

Usage: python scripts/fuzz_pipeline.py [--runs N] [--seed N] [--decoder NAME ...]

Each decoder runs in a process of its own, beginning with genuine inputs. Anything but the errors it
promises is a finding, and so is an input that does not survive being written again: the input is
printed and the exit code is 1.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import atheris
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

with atheris.instrument_imports(
    include=[
        "pipeline.agreement.manifest",
        "pipeline.protocol.last_stage_inputs",
        "pipeline.protocol.messages",
        "pipeline.protocol.step_header",
        "pipeline.protocol.step_results",
        "pipeline.protocol.step_limits",
        "pipeline.protocol.result_kinds",
    ]
):
    from pipeline.agreement import manifest
    from pipeline.protocol import (
        last_stage_inputs,
        messages,
        step_header,
        step_limits,
        step_results,
    )
    from pipeline.protocol.result_kinds import Result, Want
with atheris.instrument_imports(
    include=[
        "pipeline.weights.checkpoint_header",
        "pipeline.weights.packings",
        "pipeline.models.config",
        "pipeline.gguf",
    ]
):
    import fuzz_checkpoints

    from pipeline.models import config
    from pipeline.weights import checkpoint_header

from command_line import Parser, whole

from pipeline.codecs.registry import make_codec
from pipeline.errors import ManifestError, MessageError, ModelError, RequestFailed
from pipeline.gguf.header import CorruptGguf
from pipeline.protocol.batch import Segment
from pipeline.sampling.draw import Draw, draw
from pipeline.sampling.params import SamplingParams
from pipeline.weights.packings.base import CorruptPacking
from transport.tensor_frames import DType, Tensor, TensorSpec

LIMITS = step_limits.SessionLimits(
    num_slots=4, max_seq_len=64, max_step_tokens=32, codec=make_codec("F32", 8)
)
VOCAB = 40
ASKED_WANTS = (Want(Result.LOGPROBS, 3, 0, 1), Want(Result.DRAWN, 2), Want.DRAWN)


@dataclass(frozen=True, slots=True)
class Decoder:
    decode: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]  # what it may raise
    seeds: list[bytes]
    tokens: list[bytes]  # worth inserting


def decode_message(data: bytes) -> None:
    message = messages.decode_message(data)
    # By repr: a NaN equals nothing, itself included.
    assert repr(messages.decode_message(messages.encode_message(message))) == repr(message)


def decode_step(data: bytes) -> None:
    header = step_header.decode_step(data)
    assert step_header.encode_step(header) == data
    step_limits.check_header(header, LIMITS)
    for is_first in (True, False):
        for limits in (LIMITS, replace(LIMITS, codec=make_codec("I8", 8))):
            for declared in ((), (TensorSpec(DType.U8, (1 << 40,)),)):
                specs = step_limits.expected_inputs(
                    header, limits, is_first=is_first, declared=declared
                )
                assert sum(spec.nbytes for spec in specs) <= limits.max_tensor_bytes
    returned = step_results.expected_results(header, VOCAB, 8)
    assert sum(spec.nbytes for spec in returned) <= step_results.max_result_bytes(LIMITS, VOCAB)


def decode_asked(data: bytes) -> None:
    """Ids to score and two draws, of two rows and of one."""
    ids = Tensor(TensorSpec(DType.U32, (3,)), memoryview(data[:12].ljust(12, b"\0")))
    draws = Tensor(TensorSpec(DType.U8, (len(data[12:]),)), memoryview(data)[12:])
    found = last_stage_inputs.asked_from_wire(ASKED_WANTS, (ids, draws), VOCAB)
    logits = np.linspace(-1, 1, VOCAB, dtype=np.float32)
    for how in found.draws:
        for row in range(len(how.uniforms)):
            with contextlib.suppress(RequestFailed), np.errstate(all="ignore"):
                assert 0 <= draw(logits, how, row) < VOCAB
    assert last_stage_inputs.asked_from_wire(
        ASKED_WANTS, last_stage_inputs.asked_to_wire(found), VOCAB
    ).token_ids


def decode_manifest(data: bytes) -> None:
    found = manifest.parse_manifest(data)
    assert manifest.parse_manifest(manifest.dump_manifest(found)) == found
    assert manifest.parse_manifest(json.dumps(found.core())).core_hash() == found.core_hash()


def decode_header(data: bytes) -> None:
    position = 0
    for tensor in checkpoint_header.parse_header_untrusted(data):
        assert tensor.start == position
        position = tensor.end


def decode_config(data: bytes) -> None:
    found = config.parse_config(data, {}, Path("config.json"))
    assert found.head_dim * found.num_heads * found.hidden_dim * found.vocab_size < 1 << 80


def message_seeds() -> list[bytes]:
    init = messages.Init(
        epoch=bytes(16), stage_idx=1, activation_dtype="F32",
        hidden_dim=8, max_seq_len=64, num_slots=4, max_step_tokens=32, data_out="127.0.0.1:9011",
        upstream_measurements={0: bytes(48)}, downstream_measurements={},
    )  # fmt: skip
    names = messages.StageFigures.model_fields
    figures = messages.StageFigures.model_validate(dict.fromkeys(names, 1 << 40))
    rest = [
        messages.Health(sequence=1),
        messages.Healthy(sequence=1, figures=figures),
        messages.Start(request_id=1, slot=0),
        messages.Failure(code="busy", detail="x"),
        messages.Shutdown(),
    ]
    return [messages.encode_message(each) for each in [init, *rest]]


def step_seeds() -> list[bytes]:
    segments = (Segment(0, 5, 1), Segment(3, 0, 9))
    timings = (step_header.StageTiming(1, 2, 3),)
    headers = [
        step_header.StepHeader(step_header.StepKind.STEP, 7, segments, wants, timings)
        for wants in (
            (Want.TOKEN, Want.NOTHING),
            (Want.DRAWN, Want(Result.LOGPROBS, 9, 5, 2)),
            (Want(Result.DRAWN, 1, 5, 1), Want(Result.HIDDEN, 3)),
        )
    ]
    back = step_header.StepHeader(
        step_header.StepKind.TRUNCATE, 1, (Segment(2, 9, 0),), (Want.NOTHING,)
    )
    pair = (Segment(2, 0, 9), Segment(1, 0, 9))
    copy = step_header.StepHeader(step_header.StepKind.COPY, 1, pair, (Want.NOTHING,) * 2)
    return [step_header.encode_step(each) for each in (*headers, back, copy)]


def asked_seeds() -> list[bytes]:
    params = SamplingParams(temperature=0.7, top_k=3, top_p=0.9, logit_bias={3: 1.5})
    ids = np.array([3, 4], np.uint32)
    draws = (Draw(params, (0.25, 0.5), ids, 1, (7,), bytes(2 * 5)), Draw(params, (0.125,)))
    tensors = last_stage_inputs.asked_to_wire(last_stage_inputs.Asked((1, 2, 3), draws))
    return [b"".join(tensor.data for tensor in tensors)]


def manifest_seeds() -> list[bytes]:
    address = {"type": "tcp", "addr": "h:1"}
    enclave = {"type": "vsock", "cid": 17, "port": 5000}
    local = {"type": "unix", "path": "/s", "port": 5}
    stage = {
        "stage_idx": 0, "layer_start": 0, "layer_end": 2, "weight_hashes": ["ab" * 32],
        "require_weight_hashes": True, "precision": "float32",
        "expected_measurements": {"0": "cd" * 48},
        "endpoint": {"control": address, "data_in": enclave, "data_out": local},
    }  # fmt: skip
    bare = {"stage_idx": 0, "layer_start": 0, "layer_end": 1}
    spec = {"dtype": "F32", "hidden_dim": 8, "max_seq_len": 64}
    whole = {
        "model_name": "m", "model_version": "1", "total_layers": 3, "activation_spec": spec,
        "stages": [stage, {**bare, "stage_idx": 1, "layer_start": 2, "layer_end": 3}],
        "config_hash": "ab" * 32, "eos_token_ids": [0], "orchestrator_keys": ["ab" * 32],
    }  # fmt: skip
    core = {
        "model_name": "m", "model_version": "1", "total_layers": 1, "activation_spec": spec,
        "stages": [bare],
    }  # fmt: skip
    return [json.dumps(each, separators=(",", ":")).encode() for each in (whole, core)]


def header_seeds() -> list[bytes]:
    entries = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    }
    return [json.dumps(entries, separators=(",", ":")).encode(), b"{}"]


def config_seeds() -> list[bytes]:
    llama = {
        "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "eos_token_id": [2, 3], "rope_scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    gpt2 = {
        "model_type": "gpt2", "vocab_size": 100, "n_layer": 2, "n_embd": 32, "n_head": 4,
        "n_positions": 64,
    }  # fmt: skip
    qwen = {**llama, "model_type": "qwen2", "rope_parameters": {"rope_type": "llama3"}}
    return [json.dumps(each, separators=(",", ":")).encode() for each in (llama, gpt2, qwen)]


def names_in(seeds: list[bytes]) -> list[bytes]:
    """The quoted words of JSON seeds, and values that tend to surprise."""
    words = {
        b'"' + word + b'"' for seed in seeds for word in seed.split(b'"')[1::2] if len(word) < 40
    }
    return [
        *sorted(words),
        b"null",
        b"true",
        b"1e999",
        b"-1",
        b"18446744073709551616",
        b"[[",
        b"\\ud800",
    ]


def make_decoder(name: str) -> Decoder:
    match name:
        case "message":
            words = [word.encode() for word in messages.Init.model_fields]
            return Decoder(decode_message, (MessageError,), message_seeds(), words)
        case "step":
            return Decoder(decode_step, (MessageError,), step_seeds(), [])
        case "asked":
            return Decoder(decode_asked, (MessageError,), asked_seeds(), [])
        case "manifest":
            seeds = manifest_seeds()
            return Decoder(decode_manifest, (ManifestError,), seeds, names_in(seeds))
        case "header":
            seeds = header_seeds()
            return Decoder(
                decode_header, (checkpoint_header.CorruptHeader,), seeds, names_in(seeds)
            )
        case "gguf":
            seeds = fuzz_checkpoints.gguf_seeds()
            words = [b"tokenizer.ggml.token_type"]
            return Decoder(fuzz_checkpoints.decode_gguf, (CorruptGguf,), seeds, words)
        case _ if name in fuzz_checkpoints.PACKED:
            seeds = fuzz_checkpoints.packed_seeds(name)
            errors = (CorruptPacking, checkpoint_header.CorruptHeader)
            return Decoder(fuzz_checkpoints.decode_packed, errors, seeds, names_in(seeds))
        case _:
            seeds = config_seeds()
            return Decoder(decode_config, (ModelError,), seeds, names_in(seeds))


DECODERS = (
    "message", "step", "asked", "manifest", "header", "gguf", *fuzz_checkpoints.PACKED, "config",
)  # fmt: skip


def fuzz(name: str, num_runs: int, seed: int, directory: Path) -> None:
    """Run one decoder in this process; libFuzzer ends it, so `directory` is the caller's."""
    decoder = make_decoder(name)

    def run(data: bytes) -> None:
        with contextlib.suppress(*decoder.errors):
            decoder.decode(data)

    corpus = directory / "corpus"
    corpus.mkdir()
    for index, each in enumerate(decoder.seeds):
        decoder.decode(each)  # genuine: raises nothing
        (corpus / str(index)).write_bytes(each)
    escaped = ["".join(f"\\x{byte:02x}" for byte in token) for token in decoder.tokens]
    words = directory / "words"
    words.write_text("".join(f'"{each}"\n' for each in escaped))
    options = [
        f"-artifact_prefix={tempfile.gettempdir()}/",  # where a finding's input is kept
        *([f"-dict={words}"] if escaped else []),
        f"-runs={num_runs}",
        f"-seed={seed}",
        "-max_len=2000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(corpus)], run)
    atheris.Fuzz()


def main() -> int:
    parser = Parser(prog="fuzz_pipeline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=whole(1), default=20_000, help="inputs per decoder")
    parser.add_argument("--seed", type=whole(0), default=1, help="of the mutations")
    parser.add_argument("--decoder", nargs="*", choices=DECODERS, default=list(DECODERS))
    parser.add_argument("--in-process", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process is not None:
        fuzz(options.decoder[0], options.runs, options.seed, options.in_process)
        return 0
    failed = []
    for name in options.decoder:
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, __file__, "--in-process", directory, "--decoder", name]
            command += ["--runs", str(options.runs), "--seed", str(options.seed)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        executed = [line for line in done.stderr.split("\n") if "executed_units" in line]
        count = executed[0].split()[-1] if executed else "no"
        print(f"{name}: {count} inputs, {'failed' if done.returncode else 'promised errors only'}")
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
