"""What home knows of rows that somebody else holds, and what stands for a cache of them here."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipeline.dtypes import FLOAT32, HostArray
from pipeline.errors import MessageError
from pipeline.kernels.kv_cache import KVCache
from pipeline.kernels.kv_storage import LayerKV
from pipeline.kernels.shape_only_kernels import Outline
from pipeline.scx.codec import LayerCodec
from pipeline.scx.errors import AnswerRefused
from pipeline.scx.rows import Answer, EncodedRows, Receipt

# Of a slot's last steps home could still take back so many; beyond, its text is encoded anew.
_TAKEN_BACK = 8
# Rounding may lengthen a sum of rows by that much.
_SLACK = 1e-3
_DIGEST_BYTES = 16
# Of all layers and texts of a session: those of 8,000 tokens of a model of 32 layers, in 24 MB.
_MAX_ANSWERS = 1 << 18


class Answers:
    """What tells the last answers of a session apart: none is honestly given twice.

    Not about other rows either: every text and layer has keys of its own.
    """

    def __init__(self) -> None:
        self._digests: dict[bytes, None] = {}

    def note(self, answer: Answer) -> None:
        """Raise AnswerRefused for one that is known."""
        told = answer.log_sums.tobytes() + answer.outputs[:, 0].tobytes()
        digest = hashlib.blake2b(told, digest_size=_DIGEST_BYTES).digest()
        if digest in self._digests:
            raise AnswerRefused("an answer about encoded rows is an old one, given before")
        self._digests[digest] = None
        if len(self._digests) > _MAX_ANSWERS:
            del self._digests[next(iter(self._digests))]

    def forget(self) -> None:
        """All of them."""
        self._digests.clear()


@dataclass(slots=True)
class HeldRows:
    """One layer of one text: a codec, and what is held by it."""

    codec: LayerCodec = field(repr=False)
    answers: "Answers" = field(repr=False)
    # After each of the last steps; the last one is of what is held now.
    receipts: list[Receipt] = field(default_factory=list)
    # The longest of all rows: no sum of shares of rows is longer than all of them.
    longest: float = 0.0
    # Encoded anew, and to take the place of all that is held.
    _renewed: EncodedRows | None = field(default=None, repr=False)

    @property
    def receipt(self) -> Receipt:
        """Of what is held now."""
        return self.receipts[-1]

    @property
    def num_segments(self) -> int:
        """Of what is held: a query is asked once for each."""
        return len(self.codec.segments(self.receipt))

    def append(self, keys: HostArray, values: HostArray) -> tuple[int, EncodedRows]:
        """[KV heads, rows, head_dim] -> how many rows are held and stay so, and those behind them.

        Decoys are counted, and among the first rows.
        """
        num_held = self.receipt.num_rows + self.codec.num_decoys if self.receipts else 0
        rows = self._encoded(keys, values)
        if self._renewed is not None:
            num_held, rows = 0, self._renewed.followed_by(rows)
            self._renewed = None
        return num_held, rows

    def renew(self, codec: LayerCodec, held: EncodedRows) -> "HeldRows":
        """The same rows by another codec, all encoded together. Raises CacheRefused."""
        renewed = HeldRows(codec, self.answers)
        renewed._renewed = renewed._encoded(*self.codec.decode(held, self.receipt))
        return renewed

    def _encoded(self, keys: HostArray, values: HostArray) -> EncodedRows:
        if not self.receipts:
            rows = self.codec.encode(keys, values)
        else:
            rows = self.codec.append(keys, values, self.receipt)
        self.add(rows)
        return rows

    def add(self, rows: EncodedRows) -> None:
        """Know of encoded rows behind those that are held."""
        if not self.receipts:
            self.receipts.append(self.codec.seal(rows))
        else:
            self.receipts.append(self.codec.extend(self.receipt, rows))
            del self.receipts[:-_TAKEN_BACK]
        norms = np.einsum("hrw,hrw->hr", rows.values, rows.values)
        self.longest = max(self.longest, math.sqrt(float(norms.max())))

    def take_back(self, num_rows: int) -> bool:
        """Know of the first rows only; false where those have come in one step with others."""
        self.answers.forget()  # the same may be asked again
        while self.receipts and self.receipt.num_rows > num_rows:
            self.receipts.pop()
        return bool(self.receipts) and self.receipt.num_rows == num_rows

    def check(self, answer: Answer) -> None:
        """Raise AnswerRefused for what no shares of the rows add up to, or did so before.

        Attack: a worker that computes nothing, and says again what it said once.
        """
        norms = np.einsum("hqsw,hqsw->hqs", answer.outputs, answer.outputs)
        # not `>`: there may be something that is no number
        if not float(norms.max()) <= ((1 + _SLACK) * self.longest) ** 2:
            raise AnswerRefused(
                "an answer about encoded rows is longer than any of them: "
                "the attention worker does not compute attention"
            )
        if not np.isfinite(answer.log_sums).all():
            raise AnswerRefused("an answer about encoded rows has sums that are not finite")
        self.answers.note(answer)


class HeldElsewhere(KVCache):
    """A ledger of rows that a worker holds: there are none here."""

    __slots__ = ("_fetch", "_truncate")

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_seq_len: int,
        *,
        truncate: Callable[[int, int], None],
        fetch: Callable[[int], list[LayerKV]],
    ) -> None:
        """Have a slot's rows but the first forgotten there, and all of a slot's come back."""
        super().__init__(
            Outline(),  # of no bytes
            num_layers=num_layers,
            num_slots=num_slots,
            num_kv_heads=0,
            max_seq_len=max_seq_len,
            head_dim=0,
            dtype=FLOAT32,
        )
        self._truncate = truncate
        self._fetch = fetch

    def truncate(self, slot: int, length: int) -> None:
        """Roll `slot` back to its first `length` tokens, here and there."""
        super().truncate(slot, length)
        self._truncate(slot, length)

    def copy(self, source: int, target: int, length: int) -> None:
        """Rows are encoded for one text. Raises MessageError."""
        raise MessageError(f"slot {source}'s first {length} rows are not {target}'s: it has no key")

    def export(self, slot: int, positions: range) -> list[LayerKV]:
        """Rows as they come back, checked and decoded. Raises CacheRefused, MessageError."""
        self.ledger.check_range(slot, positions)
        inside = np.s_[:, positions.start : positions.stop]
        return [LayerKV(*(each[inside] for each in layer)) for layer in self._fetch(slot)]
