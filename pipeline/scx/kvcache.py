"""Encoded caches of a batch, layer by layer, and where each layer lies.

Rows of all sequences end together, as with padding on the left: a sequence that is shorter starts
with rows of zeros, which are not its own and nobody looks at.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.scx.encoded_layer import EncodedLayer
from pipeline.scx.errors import ScxError
from pipeline.scx.rows import Receipt
from pipeline.scx.tiers import DISK, AttentionTier, LayerOnDisk

_FORMAT = "veilpipe scx/1"
# A tier by another name than that of a device of torch.
_MEMORY = "memory"
Tier = str | AttentionTier


class EncodedKVCache:
    """The encoded layers that lie in one place. `home_layers` are better kept by their owner."""

    def __init__(
        self, layers: Mapping[int, EncodedLayer], home_layers: frozenset[int] = frozenset()
    ) -> None:
        self.layers = dict(layers)
        self.home_layers = home_layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        held = self.layers[layer]
        return held.keys, held.values

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (self[layer] for layer in sorted(self.layers))

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """How many tokens each sequence has had, masked ones counted and decoys not."""
        held = [self.layers[layer_idx]] if layer_idx is not None else [*self.layers.values()]
        return max((r.num_padding + r.num_rows for each in held for r in each.receipts), default=0)

    def save(self, path: Path | str) -> None:
        """Write what another process loads: encoded rows and receipts, no key.

        Raises ScxError where that cannot be written.
        """
        tensors, receipts = {}, {}
        for layer, held in self.layers.items():
            if held.keys.is_meta:
                raise ScxError(f"layer {layer} lies elsewhere, and cannot be written from here")
            tensors[f"{layer}.keys"] = held.keys.contiguous()
            tensors[f"{layer}.values"] = held.values.contiguous()
            receipts[layer] = [
                (r.num_first, r.num_rows, r.digest.hex(), r.num_padding, *r.chunks)
                for r in held.receipts
            ]
        said = {"receipts": receipts, "home_layers": sorted(self.home_layers)}
        try:
            save_file(tensors, path, {"format": _FORMAT, "scx": json.dumps(said)})
        except (OSError, SafetensorError) as error:
            raise ScxError(f"{path}: the encoded cache cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path | str) -> "EncodedKVCache":
        """Raises ScxError for a file that is not such a cache; what it holds is checked in use."""
        try:
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()["scx"])
                layers = {
                    int(layer): EncodedLayer(
                        file.get_tensor(f"{layer}.keys"),
                        file.get_tensor(f"{layer}.values"),
                        tuple(map(_receipt_untrusted, receipts)),
                    )
                    for layer, receipts in said["receipts"].items()
                }
                return cls(layers, frozenset(map(int, said["home_layers"])))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ScxError(f"{path} is no encoded cache") from error


def _receipt_untrusted(fields: list[Any]) -> Receipt:
    """Raises TypeError, ValueError."""
    first, rows, digest, padding, *chunks = fields
    pairs = tuple((int(start), int(count)) for start, count in chunks)
    return Receipt(int(first), int(rows), bytes.fromhex(digest), int(padding), pairs)


def split_kvcache_dynamic(
    kvcache: EncodedKVCache,
    gpu_layers: Iterable[int] | Mapping[int, Tier] | None = None,
    device_gpu: str | None = None,
    device_cpu: str = "cpu",
) -> tuple[EncodedKVCache, EncodedKVCache]:
    """(the layers placed elsewhere, all others): two caches to decode with.

    gpu_layers: their numbers, or which tier each lies on: "memory", a device of torch, "disk" or
    "disk:DIRECTORY", or an `AttentionTier`; without it every layer that is not its owner's.
    device_gpu: the tier of layers without one, CUDA's device where there is one. Raises ScxError
    for layers and tiers that there are not.
    """
    if gpu_layers is None:
        gpu_layers = kvcache.layers.keys() - kvcache.home_layers
    gpu = device_gpu or ("cuda" if torch.cuda.is_available() else _MEMORY)
    tiers = _tiers(gpu_layers, gpu)
    if missing := tiers.keys() - kvcache.layers.keys():
        raise ScxError(f"the cache has no layers {sorted(missing)}")
    rest = dict.fromkeys(kvcache.layers.keys() - tiers.keys(), device_cpu)
    first, second = (
        EncodedKVCache(_placed(kvcache.layers, part), kvcache.home_layers) for part in (tiers, rest)
    )
    return first, second


def _placed(
    layers: Mapping[int, EncodedLayer], tiers: Mapping[int, Tier]
) -> dict[int, EncodedLayer]:
    """Each layer on its tier."""
    here = {at: _moved(layers[at], tier) for at, tier in tiers.items() if isinstance(tier, str)}
    for each in {tier for tier in tiers.values() if isinstance(tier, AttentionTier)}:
        here |= each.place({at: layers[at] for at, tier in tiers.items() if tier is each})
    return dict(sorted(here.items()))


def _tiers(gpu_layers: Iterable[int] | Mapping[int, Tier], tier: str) -> dict[int, Tier]:
    if isinstance(gpu_layers, Mapping):
        return dict(gpu_layers)
    try:
        return dict.fromkeys(gpu_layers, tier)
    except TypeError:
        raise ScxError(f"gpu_layers are numbers of layers, not {gpu_layers!r}") from None


def _moved(layer: EncodedLayer, tier: str) -> EncodedLayer:
    name, _, directory = tier.partition(":")
    if name == DISK:
        return LayerOnDisk.of(layer, directory or None)
    try:
        return layer.to(torch.device("cpu" if tier == _MEMORY else tier))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ScxError(f"there is no tier {tier!r}, or it is full") from error
