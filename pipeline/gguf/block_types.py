"""What tensors of a GGUF file are made of: blocks of a few bits a weight with scales of their own.

A row of inputs is a whole number of blocks. Here each type says how long a block is and what
numbers it means, so rows are unpacked as they are read, a piece at a time.

Source: ggml's `ggml-common.h` (layouts) and `ggml-quants.c`, dequantize_row_* (numbers).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    UINT8,
    ArrayDType,
    Floats,
    HostArray,
    to_floats,
)
from transport.frozen import frozen

Bytes = npt.NDArray[np.uint8]
# Blocks [n], as records of the type's fields.
Blocks = npt.NDArray[Any]

# Levels [n, 32] uint8, scales and zeros [n] float16: weights are (level - zero) * scale.
Int4Groups = tuple[Bytes, HostArray, HostArray]
_MAX_ZERO = 1 << 14  # beyond that levels add less to a weight than halves tell apart

_SUPER_BLOCK = 256  # weights that the K types put together


@frozen
class BlockType:
    """A type of blocks: `size` weights in each, which lie in memory as `layout` says."""

    size: int
    layout: np.dtype[Any]
    unpack: Callable[[Blocks], Floats]
    # Those of four bits: levels [groups, 32], and for each a scale and a zero (`weights.int4`).
    int4: "Callable[[Blocks], Int4Groups] | None" = None

    @property
    def num_bytes(self) -> int:
        """Bytes of a block."""
        return self.layout.itemsize

    def row_bytes(self, num_in: int) -> int:
        """Bytes of a row of that many weights, a multiple of `size`."""
        return num_in // self.size * self.num_bytes


def _halves(nibbles: Bytes, *shape: int, dtype: ArrayDType = FLOAT32) -> HostArray:
    """Low halves of bytes [n, groups, width], then high ones, group by group: [n, *shape]."""
    groups, width = nibbles.shape[1:]
    out = np.empty((len(nibbles), groups, 2, width), dtype)
    out[:, :, 0] = nibbles & 0xF
    out[:, :, 1] = nibbles >> 4
    return out.reshape(len(nibbles), *shape)


def _column(values: HostArray) -> Floats:
    """[n] -> [n, 1] float32."""
    return values.astype(FLOAT32)[:, None]


def _fifth_bits(words: Bytes) -> Bytes:
    """16 where a block's word [n, 4] has a bit of one weight, else 0: [n, 32]."""
    bits: Bytes = np.unpackbits(words, axis=1, bitorder="little")
    bits <<= 4
    return bits


def _q4_0(blocks: Blocks) -> Floats:
    out = _halves(blocks["qs"], 32)
    out -= 8
    return np.multiply(out, _column(blocks["d"]), out=out)


def _q4_1(blocks: Blocks) -> Floats:
    out = _halves(blocks["qs"], 32)
    out *= _column(blocks["d"])
    return np.add(out, _column(blocks["m"]), out=out)


def _q5_0(blocks: Blocks) -> Floats:
    out = _halves(blocks["qs"], 32)
    out += _fifth_bits(blocks["qh"])
    out -= 16
    return np.multiply(out, _column(blocks["d"]), out=out)


def _q5_1(blocks: Blocks) -> Floats:
    out = _halves(blocks["qs"], 32)
    out += _fifth_bits(blocks["qh"])
    out *= _column(blocks["d"])
    return np.add(out, _column(blocks["m"]), out=out)


def _q8_0(blocks: Blocks) -> Floats:
    out: Floats = np.multiply(blocks["qs"], _column(blocks["d"]), dtype=FLOAT32)
    return out


def _scales_and_minima(blocks: Blocks) -> tuple[Floats, Floats]:
    """Of the eight groups of a super-block, [n, 8, 1] each: 6 bits times the block's own."""
    packed = blocks["scales"]
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.hstack((low & 63, high & 0xF | low >> 6 << 4))
    minima = np.hstack((middle & 63, high >> 4 | middle >> 6 << 4))
    return (
        (scales * _column(blocks["d"]))[:, :, None],
        (minima * _column(blocks["dmin"]))[:, :, None],
    )


def _q4_k(blocks: Blocks) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    out = _halves(blocks["qs"], 8, 32)
    out *= scales
    return np.subtract(out, minima, out=out)


def _q5_k(blocks: Blocks) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    out = _halves(blocks["qs"], 8, 32)
    # Bit i of a byte belongs to group i.
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    out += (blocks["qh"][:, None] >> shifts & 1) << 4
    out *= scales
    return np.subtract(out, minima, out=out)


def _q6_k(blocks: Blocks) -> Floats:
    # Each half has 128 weights in four groups: the low halves of 64 bytes, then the high ones.
    nibbles = blocks["ql"]  # [n, 2, 64]
    low = np.stack((nibbles & 0xF, nibbles >> 4), axis=2).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks["qh"][:, :, None] >> shifts & 3) << 4
    out: Floats = (low | high).astype(FLOAT32).reshape(-1, 16, 16)
    out -= 32
    out *= (blocks["scales"] * _column(blocks["d"]))[:, :, None]
    return out


# MXFP4's, by their four bits; a group's exponent is above -127.
_HALF_OF_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_HALF_OF_E2M1, *(-each for each in _HALF_OF_E2M1)], FLOAT32)
_E8M0_BIAS = 127


def _mxfp4(blocks: Blocks) -> Floats:
    exponents = blocks["e"].astype(np.int32)[:, None] - _E8M0_BIAS
    out: Floats = np.ldexp(_E2M1[_halves(blocks["qs"], 32, dtype=UINT8)], exponents)
    return out


def _plain(blocks: Blocks) -> Floats:
    return to_floats(blocks["x"])


def _q4_0_groups(blocks: Blocks) -> Int4Groups:
    scales = blocks["d"].astype(FLOAT16)
    return _nibbles(blocks), scales, np.full_like(scales, 8)


def _q4_1_groups(blocks: Blocks) -> Int4Groups:
    return _of_minima(_nibbles(blocks), to_floats(blocks["d"]), -to_floats(blocks["m"]))


def _q4_k_groups(blocks: Blocks) -> Int4Groups:
    scales, minima = (each.reshape(-1) for each in _scales_and_minima(blocks))
    return _of_minima(_nibbles(blocks), scales, minima)


def _nibbles(blocks: Blocks) -> Bytes:
    return _halves(blocks["qs"], -1, dtype=UINT8).reshape(-1, 32)


def _of_minima(levels: Bytes, scales: Floats, minima: Floats) -> Int4Groups:
    """Of weights level * scale - minimum."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        halves = scales.astype(FLOAT16)
        zeros = minima / to_floats(halves)
        is_flat = ~(np.abs(zeros) < _MAX_ZERO)  # all of a group's the same, but for rounding
        halves[is_flat], zeros[is_flat] = -minima[is_flat], 0
    levels[is_flat] = 1
    return levels, halves, zeros.astype(FLOAT16)


_D, _M = ("d", "<f2"), ("m", "<f2")
_HIGH, _LOW = ("qh", "u1", (4,)), ("qs", "u1", (1, 16))
_K = [_D, ("dmin", "<f2"), ("scales", "u1", (12,))]
_K_LOW = ("qs", "u1", (4, 32))
_Q6_K = [("ql", "u1", (2, 64)), ("qh", "u1", (2, 32)), ("scales", "i1", (16,)), _D]
# By the names that ggml gives them.
BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(32, np.dtype([_D, _LOW]), _q4_0, _q4_0_groups),
        "Q4_1": BlockType(32, np.dtype([_D, _M, _LOW]), _q4_1, _q4_1_groups),
        "Q5_0": BlockType(32, np.dtype([_D, _HIGH, _LOW]), _q5_0),
        "Q5_1": BlockType(32, np.dtype([_D, _M, _HIGH, _LOW]), _q5_1),
        "Q8_0": BlockType(32, np.dtype([_D, ("qs", "i1", (32,))]), _q8_0),
        "Q4_K": BlockType(_SUPER_BLOCK, np.dtype([*_K, _K_LOW]), _q4_k, _q4_k_groups),
        "Q5_K": BlockType(_SUPER_BLOCK, np.dtype([*_K, ("qh", "u1", (32,)), _K_LOW]), _q5_k),
        "Q6_K": BlockType(_SUPER_BLOCK, np.dtype(_Q6_K), _q6_k),
        "MXFP4": BlockType(32, np.dtype([("e", "u1"), _LOW]), _mxfp4),
    }
)
# Plain floats, named as in safetensors: blocks of one.
FLOAT_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        name: BlockType(1, np.dtype([("x", dtype)]), _plain)
        for name, dtype in (("F32", FLOAT32), ("F16", FLOAT16), ("BF16", BFLOAT16))
    }
)
ROW_TYPES: Mapping[str, BlockType] = MappingProxyType({**FLOAT_TYPES, **BLOCK_TYPES})


def unpack_rows(kind: BlockType, rows: Bytes) -> Floats:
    """The numbers of packed rows: [n, row bytes] -> [n, weights] float32."""
    blocks = np.ascontiguousarray(rows).view(kind.layout)  # [n, blocks]
    return kind.unpack(blocks.reshape(-1)).reshape(len(rows), blocks.shape[1] * kind.size)


def int4_of_rows(kind: BlockType, rows: Bytes) -> Int4Groups | None:
    """Packed rows of a type of four bits: levels [n, weights], scales and zeros [n, groups]."""
    if kind.int4 is None:
        return None
    blocks = np.ascontiguousarray(rows).view(kind.layout)
    found = kind.int4(blocks.reshape(-1))
    levels, scales, zeros = (each.reshape(len(rows), -1) for each in found)
    return levels, scales, zeros
