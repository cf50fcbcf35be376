"""Decoders of checkpoint formats for fuzz_pipeline.py, and the genuine inputs they begin with."""

import contextlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dtypes import HostArray
from pipeline.errors import ModelError
from pipeline.gguf import architectures, vocabulary
from pipeline.gguf.configurations import ROPE_FACTORS, Factors
from pipeline.gguf.header import CorruptGguf, GgufHead, parse_head_untrusted
from pipeline.models import config
from pipeline.weights import checkpoint_header
from pipeline.weights.checkpoint_header import StoredTensor
from pipeline.weights.int4 import dequantise_int4
from pipeline.weights.packings.base import CorruptPacking, PackedWeight
from pipeline.weights.packings.choice import find_packed, read_quantization


def decode_gguf(data: bytes) -> None:
    """A head, and all that is made of it."""
    head = parse_head_untrusted(data, len(data))
    factors = np.ones(8, np.float32)
    position = head.num_bytes
    for tensor in head.tensors:
        assert position <= tensor.start <= tensor.end <= len(data)
        position = tensor.end
    for read in (
        lambda: list(architectures.meanings(head)),
        lambda: as_config(head, {}),
        *(lambda name=name: as_config(head, {name: factors}) for name in ROPE_FACTORS),
        lambda: as_config(head, dict.fromkeys(ROPE_FACTORS[1:], factors)),
        lambda: vocabulary.tokenizer_fields(head.metadata),
        lambda: vocabulary.tokenizer_config_fields(head.metadata),
    ):
        with contextlib.suppress(CorruptGguf, ModelError):
            read()


def as_config(head: GgufHead, factors: Factors) -> None:
    raw = json.dumps(architectures.config_fields(head, factors)).encode()
    config.parse_config(raw, {}, Path("config.json"))


def decode_packed(data: bytes) -> None:
    """A quantization_config, a header behind it, and the bytes of which its tensors are full."""
    fields, _, rest = data.partition(b"\n")
    header, _, content = rest.partition(b"\n")
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
        unpack(weight, stored, content or b"\0")


def unpack(weight: PackedWeight, stored: Mapping[str, StoredTensor], content: bytes) -> None:
    """As floats and in four bits, as whoever loads a stage does it."""
    packing, main = weight.packing, stored[weight.main]
    sides = {key: stored[part] for key, part in weight.sides.items()}
    shape = packing.shape(main, sides)
    num_out, num_in = math.prod(shape[:-1]), shape[-1]
    if any(each.end - each.start > 1 << 16 for each in (main, *sides.values())):
        return
    if any(each.dtype not in checkpoint_header.RAW_DTYPES for each in sides.values()):
        return
    values = {key: filled(each, each.shape, content) for key, each in sides.items()}
    if "weight_shape" in values:  # but for this one nothing would come through
        with contextlib.suppress(CorruptPacking):
            packing.check(shape, values)
        values["weight_shape"] = np.array([num_out, num_in])
    packing.check(shape, values)
    rows = filled(main, checkpoint_header.as_rows(main.shape), content)
    if not num_out * num_in:
        return
    whole = (num_in, num_out) if packing.is_in_out else (num_out, num_in)
    with np.errstate(all="ignore"):
        assert packing.unpack(0, rows, values).shape == whole
        four_bits = packing.int4(0, rows, values)
        if four_bits is not None:
            weights = four_bits.turned() if packing.is_in_out else four_bits
            assert dequantise_int4(weights).shape == (num_out, num_in)


def filled(stored: StoredTensor, shape: tuple[int, ...], content: bytes) -> HostArray:
    """A tensor of these bytes, over and over."""
    raw = np.resize(np.frombuffer(content, np.uint8), stored.end - stored.start)
    return raw.view(checkpoint_header.RAW_DTYPES[stored.dtype]).reshape(shape)


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
    """Of each architecture, with its own experts, rotary factors and tokenizer."""
    sizes = {
        "embedding_length": 32, "feed_forward_length": 32, "block_count": 1, "context_length": 8,
        "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5, "attention.sliding_window": 4,
    }  # fmt: skip
    some = {"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32}
    yarn = {"type": "yarn", "factor": 2.0, "original_context_length": 4, "yarn_beta_fast": 8.0}
    ends = [("token_embd.weight", (32, 3), 8), ("output_norm.weight", (4,), 0)]
    stacks = [("blk.0.ffn_up_exps.weight", (32, 1, 2), 8), ("blk.0.ffn_gate_inp.bias", (2,), 0)]
    factors = [("rope_factors_long.weight", (8,), 0), ("rope_factors_short.weight", (8,), 0)]
    found = []
    for name, kind in [*architectures.ARCHITECTURES.items(), ("llama", architectures.MIXTRAL)]:
        own = sizes | (some if kind.has_experts else {})
        own |= {f"rope.scaling.{key}": value for key, value in yarn.items()}
        values = {f"{name}.{key}": value for key, value in own.items()}
        values |= {"general.architecture": name, "tokenizer.ggml.tokens": ["a", "b", "ab"]}
        words = {"model": "gpt2", "pre": "qwen2", "merges": ["a b"]}
        if name in {"llama", "phi3"}:
            words = {"model": "llama", "scores": [0.0, 1.0, 2.0], "bos_token_id": 0}
        values |= {f"tokenizer.ggml.{key}": value for key, value in words.items()}
        part = "attn_qkv" if "attn_qkv" in kind.parts else "attn_q"
        tensors = [(f"blk.0.{part}.weight", (1, 16), 0), *(stacks if kind.has_experts else [])]
        found.append(gguf_head(values, [*ends, *tensors, *(factors if name == "phi3" else [])]))
    return found


def _compressed(kind: str, bits: int, size: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size}
    groups = {"g": {"weights": weights}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


# A packing -> genuine quantization_configs with the tensors of a weight.
_WORDS, _HALVES = "I32", "F16"
PACKED: Mapping[str, Sequence[tuple[Any, dict[str, tuple[str, tuple[int, ...]]]]]] = {
    "awq": [
        (
            {"quant_method": "awq", "bits": 4, "group_size": size},
            {
                "qweight": (_WORDS, (inputs, 2)), "qzeros": (_WORDS, (2, 2)),
                "scales": (_HALVES, (2, 16)),
            },
        )
        for size, inputs in ((8, 16), (32, 64))
    ],
    "gptq": [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": size, "sym": size == 8},
            {
                "qweight": (_WORDS, (size // 4, 8)), "qzeros": (_WORDS, (2, 1)),
                "scales": (_HALVES, (2, 8)), **more(2 * size),
            },
        )
        for size, more in ((8, lambda inputs: {"g_idx": (_WORDS, (inputs,))}), (32, lambda _: {}))
    ],
    "compressed-tensors": [
        (
            _compressed("pack-quantized", 4, 8),
            {
                "weight_packed": (_WORDS, (8, 2)), "weight_scale": (_HALVES, (8, 2)),
                "weight_shape": ("I64", (2,)), "weight_zero_point": (_WORDS, (1, 2)),
            },
        ),
        (
            _compressed("pack-quantized", 4, 32),
            {
                "weight_packed": (_WORDS, (8, 8)), "weight_scale": (_HALVES, (8, 2)),
                "weight_shape": ("I64", (2,)), "weight_g_idx": (_WORDS, (64,)),
            },
        ),
        (
            _compressed("int-quantized", 8, 8),
            {"weight": ("I8", (4, 16)), "weight_scale": (_HALVES, (4, 1))},
        ),
    ],
    "mxfp4": [
        (
            {"quant_method": "mxfp4"},
            {"stack_blocks": ("U8", (2, 4, 3, 16)), "stack_scales": ("U8", (2, 4, 3))},
        )
    ],
    "blocks": [
        (None, {"weight.Q4_K": ("U8", (2, 288))}),
        (None, {"weight.Q4_1": ("U8", (2, 40)), "bias": ("F32", (2,))}),
        (
            None,
            {"int4": ("U8", (2, 16)), "int4_scale": ("F16", (2, 1)), "int4_zero": ("F16", (2, 1))},
        ),
    ],
}  # fmt: skip


def packed_seeds(packing: str) -> list[bytes]:
    found = []
    for config_of, tensors in PACKED[packing]:
        entries, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            start, end = end, end + math.prod(shape) * checkpoint_header.ITEM_BYTES[dtype]
            entries[f"a.{name}"] = {
                "dtype": dtype, "shape": list(shape), "data_offsets": [start, end],
            }  # fmt: skip
        lines = [json.dumps(each).encode() for each in (config_of, entries)]
        found += [b"\n".join(lines), b"\n".join([*lines, b"\1\0\0\0"])]
    return found
