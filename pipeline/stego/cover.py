"""One text that carries one message, token by token: header, body, tail. No I/O.

Anybody can follow the header's coupling, whose key is public: what it carries looks random. It
gives the keys of the body's. When the body is certain, the tail goes on for `MIN_TAIL_TOKENS` and
to the next multiple of `TAIL_TOKENS`, drawn as any sampler draws, by numbers that follow from the
message's key and all tokens before. So a reader can tell a whole text from one that was cut or
changed, even where another token would have carried the same: the last of the header or the body.
"""

import hashlib
import hmac
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.stego.codec import Reader, StegoCodec, Writer
from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.keys import KeySource, MessageKeys
from pipeline.stego.message import (
    HEADER_BYTES,
    Envelope,
    SealedMessage,
    read_header,
)
from pipeline.stego.token_weights import TokenWeights

# A text's length tells the sum of what its message needed, rounded up to this.
TAIL_TOKENS = 16
MIN_TAIL_TOKENS = 4
# Nothing that the header carries is secret, and both ends have to draw alike before there is a key.
HEADER_KEY = hashlib.sha256(b"veilpipe stego header/1").digest()
_UNIFORM_BYTES = 16


class CoverProgress(NamedTuple):
    """How many bits a text has carried of how many; all 0 needed while that is not known."""

    carried: float
    needed: int


class _Text:
    """The tokens so far, as far as the tail needs them."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._hash = hashlib.sha256()

    def add(self, token_id: int) -> None:
        self.num_tokens += 1
        self._hash.update(token_id.to_bytes(4, "little"))

    def digest(self) -> bytes:
        return self._hash.digest()


class _Tail:
    """What follows the message; both ends know it."""

    def __init__(self, keys: MessageKeys, text: _Text) -> None:
        self._key = hmac.digest(keys.tail, text.digest(), "sha256")
        self._num_left = MIN_TAIL_TOKENS + -(text.num_tokens + MIN_TAIL_TOKENS) % TAIL_TOKENS

    @property
    def is_over(self) -> bool:
        return self._num_left == 0

    def index(self, weights: TokenWeights) -> int:
        """The next token, drawn with its weight; the same until it is `passed`."""
        place = self._num_left.to_bytes(4, "little")
        uniform = hmac.digest(self._key, place, "sha256")[:_UNIFORM_BYTES]
        target = int.from_bytes(uniform, "big") * weights.total >> (8 * _UNIFORM_BYTES)
        return weights.index_at(target)

    def passed(self) -> None:
        self._num_left -= 1


@dataclass(frozen=True, slots=True)
class _WritingHeader:
    writer: Writer
    num_bits_before: int = 0


@dataclass(frozen=True, slots=True)
class _WritingBody:
    writer: Writer
    num_bits_before: int = 8 * HEADER_BYTES


@dataclass(frozen=True, slots=True)
class _WritingTail:
    tail: _Tail


class CoverWriter:
    """Chooses the tokens of a text that carries a message."""

    def __init__(self, sealed: SealedMessage, codec: StegoCodec) -> None:
        self._sealed = sealed
        self._codec = codec
        self._text = _Text()
        self._phase: _WritingHeader | _WritingBody | _WritingTail = _WritingHeader(
            codec.writer(sealed.header, HEADER_KEY)
        )

    @property
    def is_certain(self) -> bool:
        """Whether a reader of the tokens so far has the message."""
        return isinstance(self._phase, _WritingTail)

    @property
    def is_done(self) -> bool:
        """Whether the text is whole."""
        return isinstance(self._phase, _WritingTail) and self._phase.tail.is_over

    @property
    def progress(self) -> CoverProgress:
        """How far the message has come."""
        phase = self._phase
        needed = 8 * (len(self._sealed.header) + len(self._sealed.body))
        if isinstance(phase, _WritingTail):
            return CoverProgress(needed, needed)
        return CoverProgress(phase.num_bits_before + phase.writer.num_bits, needed)

    def choose(self, weights: TokenWeights) -> int:
        """The next token's index, distributed as its weights. Raises ValueError when done."""
        phase = self._phase
        if isinstance(phase, _WritingTail):
            if phase.tail.is_over:
                raise ValueError("the text is whole")
            index = phase.tail.index(weights)
            phase.tail.passed()
            return index
        index = phase.writer.choose(weights)
        self._text.add(int(weights.ids[index]))
        if phase.writer.is_certain:
            self._phase = self._following(phase)
        return index

    def _following(self, phase: _WritingHeader | _WritingBody) -> _WritingBody | _WritingTail:
        sealed = self._sealed
        if isinstance(phase, _WritingHeader):
            return _WritingBody(self._codec.writer(sealed.body, sealed.keys.codec))
        return _WritingTail(_Tail(sealed.keys, self._text))


@dataclass(frozen=True, slots=True)
class _ReadingHeader:
    reader: Reader
    num_bits_before: int = 0


@dataclass(frozen=True, slots=True)
class _ReadingBody:
    reader: Reader
    envelope: Envelope
    num_bits_before: int = 8 * HEADER_BYTES


@dataclass(frozen=True, slots=True)
class _ReadingTail:
    tail: _Tail
    message: bytes
    num_bits: int


class CoverReader:
    """Reads the message of a text, whose tokens it is shown in order."""

    def __init__(self, secret: KeySource, codec: StegoCodec, context: bytes) -> None:
        """`context`: what the message was sealed with."""
        self._secret = secret
        self._codec = codec
        self._context = context
        self._text = _Text()
        self._phase: _ReadingHeader | _ReadingBody | _ReadingTail = _ReadingHeader(
            codec.reader(HEADER_BYTES, HEADER_KEY)
        )

    @property
    def is_certain(self) -> bool:
        """Whether the message is known; from then on every token is."""
        return isinstance(self._phase, _ReadingTail)

    @property
    def is_done(self) -> bool:
        """Whether the text is whole."""
        return isinstance(self._phase, _ReadingTail) and self._phase.tail.is_over

    @property
    def progress(self) -> CoverProgress:
        """How far the message has come."""
        phase = self._phase
        if isinstance(phase, _ReadingTail):
            return CoverProgress(phase.num_bits, phase.num_bits)
        needed = 0
        if isinstance(phase, _ReadingBody):
            needed = 8 * (HEADER_BYTES + phase.envelope.num_body_bytes)
        return CoverProgress(phase.num_bits_before + phase.reader.num_bits, needed)

    @property
    def message(self) -> bytes:
        """The message, authentic. Raises Unreadable before it is certain."""
        if not isinstance(self._phase, _ReadingTail):
            raise Unreadable
        return self._phase.message

    def expected(self, weights: TokenWeights) -> int:
        """The index of the only token that can follow. Raises ValueError outside of the tail."""
        if not isinstance(self._phase, _ReadingTail) or self._phase.tail.is_over:
            raise ValueError("no token is certain here")
        return self._phase.tail.index(weights)

    def observe(self, weights: TokenWeights, index: int) -> None:
        """Learn from the next token: the `index`-th of these. Keys are derived here, once.

        Raises Unreadable where no text that carries a message for this secret goes on so.
        """
        phase = self._phase
        if isinstance(phase, _ReadingTail):
            if phase.tail.is_over or index != phase.tail.index(weights):
                raise Unreadable
            phase.tail.passed()
            return
        try:
            phase.reader.observe(weights, index)
        except StegoError:  # a choice that no bytes explain
            raise Unreadable from None
        self._text.add(int(weights.ids[index]))
        if phase.reader.is_certain:
            self._phase = self._following(phase)

    def _following(self, phase: _ReadingHeader | _ReadingBody) -> _ReadingBody | _ReadingTail:
        payload = phase.reader.payload()
        if isinstance(phase, _ReadingHeader):
            envelope = read_header(payload, self._secret)
            reader = self._codec.reader(envelope.num_body_bytes, envelope.keys.codec)
            return _ReadingBody(reader, envelope)
        message = phase.envelope.open(payload, self._context)
        num_bits = 8 * (HEADER_BYTES + phase.envelope.num_body_bytes)
        return _ReadingTail(_Tail(phase.envelope.keys, self._text), message, num_bits)
