"""An answer as blocks, one after another: a thought, a text, a call of a tool. Sans-IO."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from pydantic_core import from_json

from pipeline.gateway.continuations import PlacedToken, TextPiece
from pipeline.gateway.tool_parser import CallDelta


class BlockKind(Enum):
    """What a block is."""

    THOUGHT = auto()
    TEXT = auto()
    CALL = auto()


@dataclass(slots=True)
class Block:
    """The `index`-th block. Of a call, `call_id` and `name`; its text is its arguments' JSON."""

    kind: BlockKind
    index: int
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    tokens: list[PlacedToken] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.parts)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What a call's JSON stands for; of one that was cut off, as much of it as there is."""
        try:
            found = from_json(self.text or "{}", allow_partial="trailing-strings")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Begun:
    """A block begins."""

    block: Block


@dataclass(frozen=True, slots=True)
class More:
    """More of a block: text, and of a text the tokens that are told of."""

    block: Block
    text: str
    tokens: tuple[PlacedToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A block is whole, or `is_cut`: the answer ended within it."""

    block: Block
    is_cut: bool


Change = Begun | More | Ended


class BlockReader:
    """Makes one continuation's pieces into blocks. An answer that says nothing is an empty text."""

    def __init__(self) -> None:
        self._open: Block | None = None
        self._num_blocks = 0
        self._num_pieces = 0
        # Tokens up to the end of the last thought.
        self.num_thought = 0

    def push(self, piece: TextPiece) -> Iterator[Change]:
        """What the next piece, one token's, changes."""
        self._num_pieces += 1
        if piece.reasoning:
            self.num_thought = self._num_pieces
            yield from self._more(BlockKind.THOUGHT, piece.reasoning)
        if piece.text:
            yield from self._more(BlockKind.TEXT, piece.text, piece.tokens)
        for call in piece.calls:
            yield from self._call(call)
        if piece.finish is not None:
            if not self._num_blocks:
                yield from self._begin(BlockKind.TEXT)
            yield from self._end(is_cut=piece.finish == "length")

    def _more(
        self, kind: BlockKind, text: str, tokens: tuple[PlacedToken, ...] = ()
    ) -> Iterator[Change]:
        if self._open is None or self._open.kind is not kind:
            yield from self._begin(kind)
        yield from self._append(text, tokens)

    def _call(self, call: CallDelta) -> Iterator[Change]:
        if call.id is not None:
            yield from self._begin(BlockKind.CALL, call.id, call.name or "")
        if call.arguments:
            yield from self._append(call.arguments)

    def _append(self, text: str, tokens: tuple[PlacedToken, ...] = ()) -> Iterator[Change]:
        assert self._open is not None  # a call's first part has its id
        self._open.parts.append(text)
        self._open.tokens += tokens
        yield More(self._open, text, tokens)

    def _begin(self, kind: BlockKind, call_id: str = "", name: str = "") -> Iterator[Change]:
        yield from self._end(is_cut=False)
        self._open = Block(kind, self._num_blocks, call_id, name)
        self._num_blocks += 1
        yield Begun(self._open)

    def _end(self, *, is_cut: bool) -> Iterator[Change]:
        if self._open is not None:
            ended, self._open = self._open, None
            yield Ended(ended, is_cut)
