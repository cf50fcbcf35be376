"""Home's side of decoding over tensors, and the holder's beside it.

Whatever needs a key is in `Home`; what a stranger would compute, a layer's `attend`, is given what
he may have.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.dtypes import ArrayDType, HostArray
from pipeline.scx.codec import LayerCodec
from pipeline.scx.encoded_layer import EncodedLayer
from pipeline.scx.errors import CacheRefused
from pipeline.scx.keys import KeyGenerator
from pipeline.scx.rows import EncodedRows, Receipt
from pipeline.scx.tensors import DTYPES, array_dtype, bits, numbers, stacked


class Home:
    """Keys, decoys by layer, and what each layer of each sequence is encoded and read with."""

    def __init__(
        self,
        keys: KeyGenerator,
        num_kv_heads: int,
        decoys: list[tuple[HostArray, HostArray]] | None,
        model: bytes,
    ) -> None:
        self.keys = keys
        self._num_kv_heads = num_kv_heads
        self._decoys = decoys
        self._model = model
        self._codecs: dict[tuple[int, int, str], LayerCodec] = {}
        self._known: MutableMapping[torch.Tensor, object] = WeakTensorKeyDictionary()

    def codec(self, layer: int, sequence: int, dtype: ArrayDType) -> LayerCodec:
        """That of one layer of one sequence of the batch."""
        which = (layer, sequence, dtype.str)
        if which not in self._codecs:
            self._codecs[which] = LayerCodec(
                self.keys, layer, self._num_kv_heads, sequence,
                decoys=self._decoys[layer] if self._decoys else None,
                dtype=dtype, model=self._model,
            )  # fmt: skip
        return self._codecs[which]

    def encode(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> EncodedLayer:
        """One layer of a cache, [batch, KV heads, tokens, head_dim], without what is masked."""
        encoded, receipts = [], []
        for at, chosen in enumerate(mask.bool().to(keys.device)):
            codec = self.codec(layer, at, array_dtype(keys))
            rows = codec.encode(numbers(keys[at][:, chosen]), numbers(values[at][:, chosen]))
            encoded.append(rows)
            receipts.append(codec.seal(rows, mask.shape[1] - int(chosen.sum())))
        held = EncodedLayer(
            stacked([rows.keys for rows in encoded], keys),
            stacked([rows.values for rows in encoded], keys),
            tuple(receipts),
        )
        self.note({layer: held})
        return held

    def note(self, layers: dict[int, EncodedLayer]) -> None:
        """What is handed out now is known, until it is moved or altered."""
        for held in layers.values():
            for tensor in (held.keys, held.values):
                self._known[tensor] = (_version(tensor), held.receipts)

    def check(self, layers: dict[int, EncodedLayer]) -> None:
        """Raise CacheRefused for a layer that these keys did not encode.

        Of one that lies elsewhere nothing is here that could be looked at.
        """
        for layer, held in layers.items():
            if held.keys.is_meta or all(
                self._known.get(tensor) == (_version(tensor) or object(), held.receipts)
                for tensor in (held.keys, held.values)
            ):
                continue
            if held.keys.dtype not in DTYPES or held.keys.shape != held.values.shape:
                raise CacheRefused(layer)
            for at, receipt in enumerate(held.receipts):
                rows = EncodedRows(*(
                    bits(tensor[at, :, self.num_padding(held, receipt) :])
                    for tensor in (held.keys, held.values)
                ))  # fmt: skip
                self.codec(layer, at, array_dtype(held.keys)).check(rows, receipt)
            self.note({layer: held})

    def num_padding(self, held: EncodedLayer, receipt: Receipt) -> int:
        """The row at which a sequence starts."""
        first = held.keys.shape[2] - receipt.num_rows - self.keys.redundant_num
        return max(first, 0)


@dataclass(slots=True)
class Step:
    """One decode step through all layers; the caches change only when all of it is done."""

    home: Home
    layers: dict[int, EncodedLayer] = field(repr=False)
    done: dict[int, EncodedLayer] = field(default_factory=dict, repr=False)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """[batch, heads, 1, head_dim] each -> [batch, 1, heads, head_dim].

        After RoPE, and queries scaled.
        """
        held = self.layers[layer]
        dtype = array_dtype(held.keys)
        codecs = [self.home.codec(layer, at, dtype) for at in range(len(held.receipts))]
        more = [
            codec.append(numbers(key[at]), numbers(value[at]), receipt)
            for at, (codec, receipt) in enumerate(zip(codecs, held.receipts, strict=True))
        ]
        receipts = tuple(
            codec.extend(receipt, rows)
            for codec, receipt, rows in zip(codecs, held.receipts, more, strict=True)
        )
        held = held.followed_by(more, receipts)
        self.done[layer] = held
        groups = query.shape[1] // key.shape[1]
        outputs = []
        for at, (codec, receipt) in enumerate(zip(codecs, receipts, strict=True)):
            grouped = numbers(query[at]).reshape(key.shape[1], groups, -1)
            asked = codec.ask(grouped, receipt)
            first = self.home.num_padding(held, receipt)
            answer = held.attend(at, first, asked, codec.segments(receipt))
            outputs.append(codec.read(answer, asked, receipt).reshape(1, -1, grouped.shape[-1]))
        return torch.as_tensor(np.stack(outputs)).to(query)


def _version(tensor: torch.Tensor) -> int | None:
    """Grows whenever the tensor is written to; none where torch does not count."""
    return None if tensor.is_inference() else tensor._version + 1
