"""Keys and values of the tokens each slot has seen, preallocated for the longest context.

Three things make a cache: a ledger of what each slot holds, the memory that it lies in, and what
kernels have recorded over that memory. Here is what has to be done to several of them at once.
"""

from collections.abc import Sequence

from pipeline.dtypes import Array, ArrayDType, Floats
from pipeline.errors import MessageError
from pipeline.kernels.kv_storage import KVStorage, LayerKV, Memory, Slide, turn_of
from pipeline.kernels.recording_cache import Recordings
from pipeline.kernels.session_memory import KeptSlots
from pipeline.kernels.slot_lengths import SlotLedger
from pipeline.protocol.batch import Batch, Segment
from pipeline.protocol.tide_window import TideWindow


class KVCache:
    """One request per slot; behind the slots lie `scratch_slots` that no request can name."""

    __slots__ = ("_turn", "kept", "ledger", "recordings", "storage")

    def __init__(
        self,
        memory: Memory,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        dtype: ArrayDType,
        key_block: int = 1,
        scratch_slots: int = 0,
        window: TideWindow | None = None,
        frequencies: Floats | None = None,
        kept: KeptSlots | None = None,
    ) -> None:
        """`frequencies`: by how much a position turns keys, which a window has to know.

        `kept`: where slots lie that outlive this process, with what they hold.
        """
        self.kept = kept
        self.ledger = SlotLedger(num_slots, max_seq_len, window, kept)
        self._turn: tuple[Array, ...] | None = None
        if window is not None:
            assert frequencies is not None, "a window has been refused where keys do not turn"
            self._turn = tuple(map(memory.to_device, turn_of(window.num_dropped, frequencies)))
        self.storage = KVStorage(
            memory,
            num_layers=num_layers,
            num_slots=num_slots + scratch_slots,
            num_kv_heads=num_kv_heads,
            max_seq_len=self.ledger.max_rows,
            head_dim=head_dim,
            key_block=key_block,
            dtype=dtype,
            pages=kept,
        )
        self.recordings = Recordings()

    @property
    def keys(self) -> list[Array]:
        """Of each layer, as its storage has them."""
        return self.storage.keys

    @property
    def values(self) -> list[Array]:
        """Of each layer, as its storage has them."""
        return self.storage.values

    @property
    def capacity(self) -> int:
        """Positions that a slot has memory for."""
        return self.storage.capacity

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens held per slot."""
        return self.ledger.lengths()

    @property
    def num_rows(self) -> int:
        """Tokens whose keys and values lie in memory: under a window fewer than are held."""
        return sum(self.ledger.rows)

    @property
    def num_slots(self) -> int:
        """How many requests fit side by side."""
        return len(self.ledger.held)

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, whether touched yet or not."""
        return self.storage.num_bytes

    def reserve(self, batch: Batch) -> None:
        """Admit a step. Raises MessageError as `SlotLedger.reserve` does."""
        self.ledger.reserve(batch)

    def parts(self, batch: Batch) -> Sequence[Batch]:
        """An admitted step cut where a window drops rows; without one, as it is."""
        return self.ledger.parts(batch)

    def place(self, part: Batch) -> Batch:
        """Make room for a part of a step: where its rows go, which is their position as well."""
        turn, window = self._turn, self.ledger.window
        if turn is None or window is None:
            return part
        for slot, _, _ in part:
            if self.ledger.is_full(slot):
                slide = Slide(slot, window.num_sinks, window.num_dropped, window.size)
                self.storage.slide(slide, *turn)
                self.ledger.drop(slot)
        return self.ledger.placed(part)

    def advance(self, batch: Batch) -> None:
        """Count a computed step's tokens as held."""
        self.ledger.advance(batch)

    def truncate(self, slot: int, length: int) -> None:
        """Roll `slot` back to its first `length` tokens; what was written behind them is zeroed.

        Raises MessageError as `SlotLedger.truncate` does.
        """
        kept, written = self.ledger.truncate(slot, length)
        self.storage.zero(slot, kept, written)
        self.ledger.zeroed(slot)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give an empty slot the first `length` tokens of another, where they are.

        Raises MessageError when the one holds fewer, or the other any.
        """
        self.ledger.check_range(source, range(length))
        batch = (Segment(target, 0, length),)
        self.ledger.reserve(batch)
        self.storage.copy(source, target, length)
        self.ledger.advance(batch)

    def clear(self, slots: Sequence[int] | None = None) -> None:
        """Forget `slots` (all by default): all that was ever written there is zeroed.

        Raises MessageError for a slot that does not exist.
        """
        for slot in range(self.num_slots) if slots is None else slots:
            self.truncate(slot, 0)

    def release(self) -> None:
        """Zero what was used and give the memory back at once, whoever still refers to this."""
        if self.kept is not None:
            self.kept.forget()
        self.clear()
        self.recordings.clear()
        self.storage.release()
        if self.kept is not None:
            self.kept.release()

    def range_bytes(self, num_positions: int) -> int:
        """Bytes of what `export` gives for so many positions."""
        return self.storage.range_bytes(num_positions)

    def export(self, slot: int, positions: range) -> list[LayerKV]:
        """Keys and values at consecutive positions of a slot, of every layer, on the host.

        They do not depend on the kernels whose cache this is, and are the caller's own. Raises
        MessageError when the slot does not exist, does not hold all of them, or has dropped any:
        what a window has moved is no longer that of a position.
        """
        self.ledger.check_range(slot, positions)
        return self.storage.read(slot, positions)

    def restore(self, slot: int, position: int, layers: Sequence[LayerKV]) -> None:
        """Append what a cache of the same model has exported; the slot then holds these tokens.

        `position` is that of the first, and has to be the one behind what the slot holds: keys
        know their positions. Raises MessageError for that, for another model's layers, shapes or
        dtype, for more than the context takes, and under a window for more than it holds before it
        drops any; then nothing has changed.
        """
        num_positions = self.storage.check(layers)
        if num_positions == 0:
            raise MessageError("no keys and values to restore")
        self.ledger.check_whole(slot, position + num_positions)
        batch = (Segment(slot, position, num_positions),)
        self.ledger.reserve(batch)
        self.storage.write(slot, position, layers)
        self.ledger.advance(batch)
