"""Decoders of checkpoint formats for fuzz_pipeline.py, and the genuine inputs they begin with."""

import contextlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.errors import ModelError
from pipeline.gguf import architectures, vocabulary
from pipeline.gguf.header import CorruptGguf, parse_head_untrusted
from pipeline.models import config
from pipeline.weights import checkpoint_header
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.packings.base import PackedWeight
from pipeline.weights.packings.choice import find_packed, read_quantization


def decode_gguf(data: bytes) -> None:
    """A head, and all that is made of it."""
    head = parse_head_untrusted(data, len(data))
    position = head.num_bytes
    for tensor in head.tensors:
        assert position <= tensor.start <= tensor.end <= len(data)
        position = tensor.end
    for read in (
        lambda: architectures.meanings(head),
        lambda: config.parse_config(
            json.dumps(architectures.config_fields(head, None)).encode(), {}, Path("config.json")
        ),
        lambda: architectures.config_fields(head, np.ones(8, np.float32)),
        lambda: vocabulary.tokenizer_fields(head.metadata),
        lambda: vocabulary.tokenizer_config_fields(head.metadata),
    ):
        with contextlib.suppress(CorruptGguf, ModelError):
            read()


def decode_packed(data: bytes) -> None:
    """A quantization_config and a header behind it, and weights of as many zeros as it says."""
    fields, _, header = data.partition(b"\n")
    try:
        parsed = json.loads(fields)
    except (ValueError, RecursionError):
        return
    try:
        packing = read_quantization(parsed)
    except ValueError:
        return
    stored = {each.name: each for each in checkpoint_header.parse_header_untrusted(header)}
    for weight in find_packed(stored, packing).values():
        unpack_zeros(weight, stored)


def unpack_zeros(weight: PackedWeight, stored: Mapping[str, StoredTensor]) -> None:
    sides = {key: stored[part] for key, part in weight.sides.items()}
    main = stored[weight.main]
    shape = weight.packing.shape(main, sides)
    num_out, num_in = math.prod(shape[:-1]), shape[-1]
    if any(each.end - each.start > 1 << 16 for each in (main, *sides.values())):
        return
    dtypes = checkpoint_header.RAW_DTYPES
    if any(each.dtype not in dtypes for each in sides.values()):
        return
    values = {key: np.zeros(each.shape, dtypes[each.dtype]) for key, each in sides.items()}
    if "weight_shape" in values:
        values["weight_shape"] = np.array([num_out, num_in])
    weight.packing.check(shape, values)
    rows = np.zeros(checkpoint_header.as_rows(main.shape), dtypes[main.dtype])
    if num_out * num_in:
        with np.errstate(all="ignore"):
            found = weight.packing.unpack(0, rows, values)
        whole = (num_in, num_out) if weight.packing.is_in_out else (num_out, num_in)
        assert found.shape == whole


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def value_bytes(value: object) -> bytes:
    match value:
        case str():
            return struct.pack("<I", 8) + text(value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case [*numbers]:
            return struct.pack(f"<IIQ{len(numbers)}f", 9, 6, len(numbers), *numbers)
        case _:
            raise TypeError(value)


def gguf_head(values: dict[str, object], tensors: list[tuple[str, tuple[int, ...], int]]) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))]
    parts += [text(key) + value_bytes(value) for key, value in values.items()]
    at = 0
    for name, shape, kind in tensors:
        parts.append(text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", kind, at))
        num_bytes = math.prod(shape) * (4 if kind == 0 else 34 / 32)
        at += -(-int(num_bytes) // 32) * 32
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % 32 + at)


def gguf_seeds() -> list[bytes]:
    sizes = {
        "embedding_length": 32, "feed_forward_length": 32, "block_count": 1, "context_length": 8,
        "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    tensors = [("token_embd.weight", (32, 3), 8), ("blk.0.attn_q.weight", (32, 32), 8)]
    found = []
    for name in architectures.ARCHITECTURES:
        values = {f"{name}.{key}": value for key, value in sizes.items()}
        values |= {f"{name}.attention.sliding_window": 4} if name == "gemma3" else {}
        values |= {"general.architecture": name, "tokenizer.ggml.tokens": ["a", "b", "ab"]}
        kind = {"model": "gpt2", "pre": "qwen2", "merges": ["a b"]}
        if name == "llama":
            kind = {"model": "llama", "scores": [0.0, 1.0, 2.0], "bos_token_id": 0}
        values |= {f"tokenizer.ggml.{key}": value for key, value in kind.items()}
        found.append(gguf_head(values, [*tensors, ("output_norm.weight", (32,), 0)]))
    return found


def packed_seeds() -> list[bytes]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
    group = {"config_groups": {"g": {"weights": weights}}, "quant_method": "compressed-tensors"}
    whole = {**group, "config_groups": {"g": {"weights": {**weights, "num_bits": 8}}}}
    ints, halves = "I32", "F16"
    kinds = [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 8},
            {"qweight": (ints, (16, 2)), "qzeros": (ints, (2, 2)), "scales": (halves, (2, 16))},
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True},
            {
                "qweight": (ints, (2, 8)), "qzeros": (ints, (2, 1)), "scales": (halves, (2, 8)),
                "g_idx": (ints, (16,)),
            },
        ),
        (
            {**group, "format": "pack-quantized"},
            {
                "weight_packed": (ints, (8, 2)), "weight_scale": (halves, (8, 2)),
                "weight_shape": ("I64", (2,)), "weight_zero_point": (ints, (1, 2)),
            },
        ),
        (
            {**whole, "format": "int-quantized"},
            {"weight": ("I8", (4, 16)), "weight_scale": (halves, (4, 1))},
        ),
        (
            {"quant_method": "mxfp4"},
            {"stack_blocks": ("U8", (2, 4, 3, 16)), "stack_scales": ("U8", (2, 4, 3))},
        ),
        (None, {"weight.Q4_K": ("U8", (2, 288))}),
    ]  # fmt: skip
    found = []
    for config_of, tensors in kinds:
        entries, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * checkpoint_header.ITEM_BYTES[dtype]
            entries[f"a.{name}"] = {
                "dtype": dtype, "shape": list(shape), "data_offsets": [start, end],
            }  # fmt: skip
        found.append(json.dumps(config_of).encode() + b"\n" + json.dumps(entries).encode())
    return found
