"""Messages into texts and back, over an engine: many at once, each checked before it is handed out.

Reading replays a text token by token, as it was written: a prefill of the whole text would round
otherwise, and one other bit at one token loses the message.
"""

import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import trio

from pipeline.engine.generation import Engine, Generation
from pipeline.stego.chooser import ReadingChooser, WritingChooser
from pipeline.stego.codecs import parse_codec
from pipeline.stego.cover import (
    MIN_TAIL_TOKENS,
    TAIL_TOKENS,
    CoverProgress,
    CoverReader,
    CoverWriter,
)
from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.fingerprint import Fingerprint, Settings
from pipeline.stego.keys import KeySource, MessageKeys, Secret
from pipeline.stego.message import HEADER_BYTES, TAG_BYTES, SealedMessage, seal
from pipeline.stego.retokenise import CoverTokenizer
from pipeline.stego.statistics import Statistics

# A text that its own tokenizer splits otherwise is thrown away as soon as that shows, and another
# one written. Drawn from a whole vocabulary, one token in a few hundred brings that about.
MAX_TRIES = 256
# How often a text is held against its tokens while it grows.
_CHECK_EVERY = 8
# A quarter of a bit a token is as little as anybody would wait for.
_TOKENS_PER_BIT = 4

# Each takes 64 MiB and a processor for a moment, in a thread.
_MAX_DERIVING = 2

Hear = Callable[[CoverProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What writing and reading have in common.

    `max_tokens` None: as many as make sense, within the context.
    """

    prompt_ids: tuple[int, ...] = field(repr=False)
    secret: Secret
    settings: Settings
    max_tokens: int | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A text that carries a message, and what it took."""

    text: str = field(repr=False)
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Found:
    """The message of a text, and what it took."""

    message: bytes = field(repr=False)
    statistics: Statistics


def _ignore(_: CoverProgress) -> None:
    pass


def num_written_tokens(num_message_bytes: int) -> int:
    """As many tokens as a text of so many bytes may come to, unless told otherwise."""
    num_bits = 8 * (HEADER_BYTES + num_message_bytes + TAG_BYTES)
    return _TOKENS_PER_BIT * num_bits + MIN_TAIL_TOKENS + TAIL_TOKENS


def num_read_tokens(num_text_tokens: int) -> int:
    """As many tokens as reading a text of so many may come to: whitespace is put back."""
    return num_text_tokens + TAIL_TOKENS


class _KeysNeeded(StegoError):
    """A text's header is read; the keys of its message are to be derived elsewhere."""

    def __init__(self, salt: bytes) -> None:
        super().__init__("the keys are not derived yet")
        self.salt = salt


class _KeysLater:
    """Stops whoever reads where keys would be derived, which would hold up everybody."""

    def keys(self, salt: bytes) -> MessageKeys:
        raise _KeysNeeded(salt)


@dataclass(frozen=True, slots=True)
class _KnownKeys:
    """Keys that have been derived."""

    known: MessageKeys

    def keys(self, _salt: bytes) -> MessageKeys:
        return self.known


class StegoService:
    """Writes and reads over one engine, which others may share.

    `model`: what of the fingerprint is the model's. Unless rows are exact, a text depends on those
    computed beside it: then only one request at a time is taken, and nobody else may share.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: CoverTokenizer,
        model: Fingerprint,
        *,
        is_row_exact: bool,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model
        self.is_row_exact = is_row_exact
        self._num_open = 0
        self._deriving = trio.CapacityLimiter(_MAX_DERIVING)

    def fingerprint(self, settings: Settings) -> Fingerprint:
        """What a message is bound to, with these settings."""
        return self._model.model_copy(
            update=settings.model_dump(include=set(Settings.model_fields))
        )

    async def hide(
        self, message: bytes, task: Task, hear: Hear = _ignore, *, compresses: bool = True
    ) -> Hidden:
        """Write a text that carries a message. `hear` is told how far it has come.

        Raises StegoError where none can be written, and what the engine raises.
        """
        started = time.perf_counter()
        self._tokens_left(task)  # before minutes of work
        context = self.fingerprint(task.settings).context(task.prompt_ids)
        with self._admitted():
            for num_retries in range(MAX_TRIES):
                sealed = await trio.to_thread.run_sync(
                    partial(seal, message, task.secret, context, compresses=compresses),
                    limiter=self._deriving,
                )
                chooser = await self._write(sealed, task, hear)
                if chooser is None:
                    continue
                text = self._tokenizer.cover(chooser.token_ids)
                await self._verify(text, message, task, sealed.keys)
                seconds = time.perf_counter() - started
                num_bits = 8 * (len(sealed.header) + len(sealed.body))
                return Hidden(
                    text,
                    Statistics(chooser.steps, len(message), num_bits, seconds, num_retries),
                )
        raise StegoError(
            f"none of {MAX_TRIES} texts is split into its own tokens again; "
            "a shorter message, a lower temperature or a smaller top-k makes that likelier"
        )

    async def find(self, text: str, task: Task, hear: Hear = _ignore) -> Found:
        """The message of a text; whitespace at its end, and a space at its start, may be lost.

        Raises StegoError where there is none for this task, and what the engine raises.
        """
        started = time.perf_counter()
        with self._admitted():
            try:
                chooser = await self._read_alone(text, task, hear)
            except Unreadable:
                if text[:1].isspace():
                    raise
                chooser = await self._read_alone(" " + text, task, hear)
        message = chooser.reader.message
        num_bits = chooser.reader.progress.needed
        seconds = time.perf_counter() - started
        return Found(message, Statistics(chooser.steps, len(message), num_bits, seconds))

    async def _write(self, sealed: SealedMessage, task: Task, hear: Hear) -> WritingChooser | None:
        """A text, if it can be split into its tokens again."""
        codec = parse_codec(task.settings.codec)
        chooser = WritingChooser(CoverWriter(sealed, codec))
        most = task.max_tokens or num_written_tokens(len(sealed.body) - TAG_BYTES)
        num_left = min(self._tokens_left(task), most)
        self._check_room(chooser.writer.progress.needed, task.settings, num_left)
        async with self._chosen(task, chooser, num_left) as outputs:
            async for _ in outputs:
                hear(chooser.writer.progress)
                if chooser.is_over:
                    break
                is_due = len(chooser.token_ids) % _CHECK_EVERY == 0
                if is_due and not self._tokenizer.may_survive(chooser.token_ids):
                    return None
        if not chooser.is_over:
            carried, needed = chooser.writer.progress
            raise StegoError(
                f"the text carries {carried:.0f} of {needed} bits after "
                f"{len(chooser.token_ids)} tokens, and may not go on; give a longer context or "
                "more tokens, a shorter message, or a prompt that leaves more open"
            )
        survives = self._tokenizer.survives(chooser.token_ids, chooser.num_needed)
        return chooser if survives else None

    async def _read_alone(self, text: str, task: Task, hear: Hear) -> ReadingChooser:
        """Read; where the keys are those of a passphrase, the header first."""
        if not task.secret.passphrase:
            return await self._read(text, task, task.secret, hear)
        try:
            return await self._read(text, task, _KeysLater(), hear)
        except _KeysNeeded as needed:
            salt = needed.salt
        keys = await trio.to_thread.run_sync(task.secret.keys, salt, limiter=self._deriving)
        return await self._read(text, task, _KnownKeys(keys), hear)

    async def _read(self, text: str, task: Task, secret: KeySource, hear: Hear) -> ReadingChooser:
        token_ids = self._tokenizer.ids(text)
        num_room = self._tokens_left(task)
        if not text.strip():
            raise Unreadable
        if len(token_ids) > num_room:
            raise StegoError(
                f"the text has {len(token_ids)} tokens, and the context has room for {num_room} "
                "beside the prompt; give the context that it was written with"
            )
        context = self.fingerprint(task.settings).context(task.prompt_ids)
        reader = CoverReader(secret, parse_codec(task.settings.codec), context)
        chooser = ReadingChooser(reader, token_ids)
        num_left = min(num_room, num_read_tokens(len(token_ids)))
        async with self._chosen(task, chooser, num_left) as outputs:
            async for _ in outputs:
                hear(reader.progress)
                if chooser.is_over:
                    break
        if chooser.failure is not None:
            raise chooser.failure
        whole = self._tokenizer.cover(chooser.token_ids)
        if not reader.is_done or whole.rstrip() != text.rstrip():
            raise Unreadable
        return chooser

    async def _verify(self, text: str, message: bytes, task: Task, keys: MessageKeys) -> None:
        try:
            found = (await self._read(text, task, _KnownKeys(keys), _ignore)).reader.message
        except StegoError:
            found = b""
        if found != message:
            raise StegoError(
                "the text was written, but its message could not be read from it: "
                "the stages do not compute the same twice"
            )

    @asynccontextmanager
    async def _chosen(
        self, task: Task, chooser: WritingChooser | ReadingChooser, num_tokens: int
    ) -> AsyncIterator[trio.abc.ReceiveChannel[object]]:
        generation = Generation(
            task.prompt_ids,
            num_tokens,
            frozenset(),
            task.settings.sampling,
            masks=(self._tokenizer.mask,),
            chooser=lambda: chooser,
            request_id=task.request_id,
        )
        async with self._engine.generate(generation) as outputs:
            yield outputs

    def _check_room(self, num_bits: int, settings: Settings, num_tokens: int) -> None:
        """Raise StegoError where not even the most even of distributions would carry so much."""
        # Tokens that are less likely carry more; that all are to so many bits happens never.
        num_choices = settings.sampling.top_k or self._tokenizer.num_tokens
        if num_bits > num_tokens * math.log2(num_choices) + 8 * TAG_BYTES:
            most = num_tokens * math.log2(num_choices)
            raise StegoError(
                f"the text carries 0 of {num_bits} bits: its {num_tokens} tokens would carry "
                f"{most:.0f} at best; give a longer context, more tokens or a shorter message"
            )

    def _tokens_left(self, task: Task) -> int:
        """How many tokens the context has beside the prompt. Raises StegoError if it has none."""
        _ = task.settings.sampling  # raises for what leaves nothing to choose from
        left = self._engine.max_seq_len + 1 - len(task.prompt_ids)
        if left < 2:
            raise StegoError(
                f"the prompt has {len(task.prompt_ids)} tokens and the context holds "
                f"{self._engine.max_seq_len}; shorten it"
            )
        return left

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._num_open and not self.is_row_exact:
            raise StegoError(
                "these stages' kernels compute a text otherwise beside others, so that its message "
                "would be lost; ask for one at a time, or use kernels with exact rows"
            )
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1
