"""Which weights of a model are packed, and how: by its tensors' names, and its config.json."""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.weights.packings.awq import Awq
from pipeline.weights.packings.base import PackedWeight
from pipeline.weights.packings.blocks import find_blocks
from pipeline.weights.packings.compressed_tensors import PackedWords, WholeBytes
from pipeline.weights.packings.gptq import Gptq
from pipeline.weights.packings.mxfp4 import Mxfp4
from pipeline.weights.packings.own import find_own

MAX_GROUP_SIZE = 1 << 20
SUPPORTED = "awq, gptq, compressed-tensors and mxfp4 are"


class Finder(Protocol):
    """A packing that a whole model has."""

    def find(self, names: Collection[str]) -> Iterator[PackedWeight]:
        """The weights among these tensors that are packed so."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, defer_build=True)


class _Awq(_Fields):
    bits: int
    group_size: int
    version: str = "gemm"
    zero_point: bool = True


class _Gptq(_Fields):
    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str = "gptq"


class _Weights(_Fields):
    num_bits: int
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None


class _Group(_Fields):
    weights: _Weights


class _CompressedTensors(_Fields):
    format: str
    config_groups: dict[str, _Group]


def find_packed(names: Collection[str], finder: Finder | None = None) -> dict[str, PackedWeight]:
    """The packed weights among these tensors, by the names of the weights."""
    found = {each.name: each for each in (*find_blocks(names), *find_own(names))}
    return found if finder is None else found | {each.name: each for each in finder.find(names)}


def stays_packed(finder: Finder | None) -> bool:
    """Whether a shard in any precision holds these weights as they are.

    They take less than in any of ours, and what a stage makes of them is the same.
    """
    return isinstance(finder, Mxfp4)


def read_quantization(fields: object) -> Finder | None:
    """What a config.json's `quantization_config` means; None where there is none.

    Raises ValueError saying what is not supported.
    """
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise ValueError("it is no object")
    method = fields.get("quant_method")
    readers = {
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed_tensors,
        "mxfp4": _mxfp4,
    }
    if not isinstance(method, str) or method not in readers:
        kind = fields.get("bnb_4bit_quant_type")
        name = str(method) if kind is None else f"{method} {kind}"
        raise ValueError(f"{name[:60]!r} weights are not supported: {SUPPORTED}")
    try:
        return readers[method](fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}") from error


def _mxfp4(fields: dict[str, Any]) -> Finder:
    del fields  # which modules are packed is seen by their tensors
    return Mxfp4()


def _awq(fields: dict[str, Any]) -> Finder:
    raw = _Awq.model_validate(fields)
    if raw.bits != 4 or raw.version.lower() != "gemm":
        raise ValueError(f"awq of {raw.bits} bits, version {raw.version[:20]!r}: 4, 'gemm' is read")
    return Awq(_group_size(raw.group_size))


def _gptq(fields: dict[str, Any]) -> Finder:
    raw = _Gptq.model_validate(fields)
    if raw.bits not in {2, 4, 8} or raw.checkpoint_format not in {"gptq", "gptq_v2"}:
        raise ValueError(
            f"gptq of {raw.bits} bits, {raw.checkpoint_format[:20]!r}: 2, 4 and 8, 'gptq' and "
            "'gptq_v2' are read"
        )
    return Gptq(
        raw.bits,
        _group_size(raw.group_size),
        is_symmetric=raw.sym,
        is_second_version=raw.checkpoint_format == "gptq_v2",
        is_act_order=raw.desc_act,
    )


def _compressed_tensors(fields: dict[str, Any]) -> Finder:
    raw = _CompressedTensors.model_validate(fields)
    kinds = {group.weights.model_dump_json(): group.weights for group in raw.config_groups.values()}
    if len(kinds) != 1:
        raise ValueError(f"{len(kinds)} kinds of weights in one model: one is read")
    (weights,) = kinds.values()
    shown = f"{raw.format[:30]!r} of {weights.num_bits} bits, {weights.type[:20]!r}"
    if weights.type == "int" and raw.format == "pack-quantized" and weights.num_bits in {4, 8}:
        is_grouped = weights.strategy in {"group", None} and weights.group_size is not None
        return PackedWords(
            weights.num_bits, _group_size(weights.group_size or -1) if is_grouped else None
        )
    if weights.type == "int" and raw.format in {"int-quantized", "naive-quantized"}:
        if weights.num_bits != 8 or not weights.symmetric:
            raise ValueError(f"{shown} with zeros: int-quantized is read of 8 bits, symmetric")
        return WholeBytes()
    raise ValueError(f"{shown}: 'pack-quantized' of 4 and 8 bits and 'int-quantized' are read")


def _group_size(value: int) -> int | None:
    """Inputs that share a scale; -1 stands for all."""
    if value == -1:
        return None
    if not 0 < value <= MAX_GROUP_SIZE:
        raise ValueError(f"group_size: {value}")
    return value
