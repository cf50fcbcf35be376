"""Where an encoded layer may lie beside this machine's memory and its devices: on disk, elsewhere.

On disk it is a file that is mapped, so that the system decides what of it is in memory. Elsewhere
it is with an attention worker (`stage-worker attention`), which attends to it there: what is here
of it are shapes and receipts.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.dtypes import HostArray
from pipeline.errors import PartLost, PartRefused
from pipeline.remote_parts.dialing import dial_worker
from pipeline.remote_parts.link import PartLink
from pipeline.remote_parts.parts import Asked
from pipeline.remote_parts.wire import PartRefusal, to_array, to_tensor
from pipeline.scx.attention_wire import ANSWER_LIMITS, Opening, Span, attend_bytes, opening_bytes
from pipeline.scx.encoded_layer import EncodedLayer
from pipeline.scx.errors import AnswerRefused, ScxError
from pipeline.scx.rows import Answer, EncodedRows, Receipt
from pipeline.scx.tensors import bits

DISK = "disk"
# A file is made for so many times the rows there are, and is made anew when they are there.
_GROWTH = 2


@dataclass(frozen=True, slots=True)
class LayerOnDisk(EncodedLayer):
    """Keys and values are views of a file that has room for more rows."""

    room: torch.Tensor = field(repr=False, kw_only=True)  # [2, sequences, KV heads, rows, width]
    directory: str | None = field(kw_only=True)

    @classmethod
    def of(
        cls, layer: EncodedLayer, directory: str | None, capacity: int | None = None
    ) -> "LayerOnDisk":
        """A layer written to a file that goes with it. Raises ScxError where there is no room."""
        sequences, heads, rows, width = layer.keys.shape
        shape = (2, sequences, heads, capacity or _GROWTH * rows, width)
        room = _mapped(shape, layer.keys.dtype, directory)
        room[0, :, :, :rows] = layer.keys
        room[1, :, :, :rows] = layer.values
        return cls._seen(room, rows, layer.receipts, directory)

    @classmethod
    def _seen(
        cls, room: torch.Tensor, rows: int, receipts: tuple[Receipt, ...], directory: str | None
    ) -> "LayerOnDisk":
        keys, values = room[0, :, :, :rows], room[1, :, :, :rows]
        return cls(keys, values, receipts, room=room, directory=directory)

    def followed_by(
        self, more: Sequence[EncodedRows], receipts: tuple[Receipt, ...]
    ) -> "LayerOnDisk":
        """With a row more of each sequence, behind those that are seen so far."""
        rows = self.keys.shape[2]
        count = more[0].num_rows
        if rows + count > self.room.shape[3]:
            grown = self.of(self, self.directory, _GROWTH * (rows + count))
            return grown.followed_by(more, receipts)
        for place, stacked in zip(self.room, self.stacked(more), strict=True):
            place[:, :, rows : rows + count] = stacked
        return self._seen(self.room, rows + count, receipts, self.directory)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype, directory: str | None) -> torch.Tensor:
    count = int(np.prod(shape))
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            # Not a sparse file: what does not fit later would end the process.
            os.posix_fallocate(file.fileno(), 0, max(count * dtype.itemsize, 1))
            flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise ScxError(f"an encoded layer does not fit on disk: {error}") from error
    return flat.reshape(shape)


@dataclass(frozen=True, slots=True)
class LayerElsewhere(EncodedLayer):
    """What an attention worker holds: keys and values here have shapes alone.

    `pending`: rows that go with the next question. A step that fails in its midst leaves the worker
    with rows that nobody counts, and the cache is then refused.
    """

    link: Asked = field(repr=False, kw_only=True)
    index: int = field(kw_only=True)
    pending: tuple[EncodedRows, ...] = field(repr=False, default=(), kw_only=True)

    def followed_by(
        self, more: Sequence[EncodedRows], receipts: tuple[Receipt, ...]
    ) -> "LayerElsewhere":
        """With a row more of each sequence, which leaves with the query."""
        shape = list(self.keys.shape)
        shape[2] += more[0].num_rows
        seen = torch.empty(shape, dtype=self.keys.dtype, device="meta")
        return LayerElsewhere(
            seen, seen, receipts, link=self.link, index=self.index, pending=tuple(more)
        )

    def attend(
        self, at: int, first: int, asked: HostArray, segments: Sequence[tuple[int, int]]
    ) -> Answer:
        """Ask. Raises AnswerRefused, PartLost."""
        del first  # what is masked is not sent
        heads, queries, _, width = asked.shape
        rows, stops = self.pending[at], tuple(stop for _, stop in segments)
        span = Span(at, stops[-1] - rows.num_rows, rows.num_rows, queries, stops)
        sent = (rows.keys, rows.values, asked.reshape(heads, -1, width))
        tensors = tuple(to_tensor(each) for each in sent)
        try:
            _, answered = self.link.ask(attend_bytes(self.index, [span]), tensors)
            outputs, sums = (to_array(each) for each in answered)
        except (PartRefusal, ValueError) as error:
            raise AnswerRefused("an answer about an encoded cache is none") from error
        if outputs.shape != sent[2].shape or sums.shape != outputs.shape[:2]:
            raise AnswerRefused("an answer about an encoded cache has another shape")
        return Answer(outputs.reshape(asked.shape), sums.reshape(asked.shape[:3]))


class AttentionTier:
    """An attention worker as a tier, for the layers of one cache.

    max_rows: of a sequence, decoys counted: what the worker reserves. Raises ScxError where that
    is more than it gives, and for another kind of number than float32.
    """

    def __init__(self, link: Asked, max_rows: int) -> None:
        self._link = link
        self._max_rows = max_rows

    @classmethod
    def dial(
        cls, manifest: Path | str, max_rows: int, *, identity: Path | None = None, dev: bool = False
    ) -> "AttentionTier":
        """The worker that a manifest names (`pipeline-orch plan --attention ADDR`).

        identity: the key of the manifest's stage [the machine's]; `dev`: in development there is
        none. Raises InputError, mostly ScxError where the worker cannot be had.
        """
        try:
            link = dial_worker(
                Path(manifest), "attention", ANSWER_LIMITS, identity=identity, dev=dev
            )
        except (PartLost, PartRefused) as error:
            raise ScxError(f"the tier cannot be had: {error}") from error
        return cls(link, max_rows)

    def close(self) -> None:
        """Let go of the worker, where it was dialed: it forgets what it holds."""
        if isinstance(self._link, PartLink):
            self._link.close()

    def place(self, layers: Mapping[int, EncodedLayer]) -> dict[int, EncodedLayer]:
        """Send layers there, once. Raises ScxError."""
        first = next(iter(layers.values()))
        sequences, heads, _, width = first.keys.shape
        if first.keys.dtype != torch.float32:
            raise ScxError("an attention worker holds float32")
        opening = Opening(len(layers), heads, width, sequences, self._max_rows)
        try:
            self._link.ask(opening_bytes(opening))
            return {
                number: self._placed(index, layer)
                for index, (number, layer) in enumerate(sorted(layers.items()))
            }
        except (PartLost, PartRefused, PartRefusal) as error:
            raise ScxError(f"the tier cannot be had: {error}") from error

    def _placed(self, index: int, layer: EncodedLayer) -> LayerElsewhere:
        nothing = to_tensor(bits(layer.keys[0, :, :0]))
        for at, receipt in enumerate(layer.receipts):
            first = layer.first_row(receipt)
            own = [bits(each[at, :, first:]) for each in (layer.keys, layer.values)]
            span = Span(at, 0, own[0].shape[1], 0)
            tensors = (*map(to_tensor, own), nothing)
            self._link.ask(attend_bytes(index, [span]), tensors)
        seen = torch.empty(layer.keys.shape, dtype=layer.keys.dtype, device="meta")
        return LayerElsewhere(seen, seen, layer.receipts, link=self._link, index=index)
