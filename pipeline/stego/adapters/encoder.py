"""A message to text and back, by whatever engine generates with a callback on its logits."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from pipeline.stego.adapters.conditional import Conditioning, index_of
from pipeline.stego.adapters.request import StegoRequest
from pipeline.stego.codecs import codec_name, parse_codec
from pipeline.stego.cover import CoverProgress, CoverReader, CoverWriter
from pipeline.stego.errors import StegoError, Unreadable
from pipeline.stego.fingerprint import DEFAULT_CODEC
from pipeline.stego.keys import Secret
from pipeline.stego.message import seal
from pipeline.stego.token_weights import TokenWeights

# Of the whole vocabulary a token in a hundred may not come back from its text, of the likeliest
# fifty a token in thousands.
NUM_TRIES = 64
DEFAULT_MAX_TOKENS = 1024


class TextTokenizer(Protocol):
    """As `transformers` and this project have them."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...


class Engine(Protocol):
    """A model that generates with a callback on its logits."""

    tokenizer: TextTokenizer
    fingerprint: str
    """What decides the numbers: model, precision, the engine's version."""
    end_token_id: int
    special_token_ids: Sequence[int]
    """Tokens that no text of a message may hold, those that end a text among them."""

    def generate(
        self, prompt_ids: Sequence[int], request: StegoRequest, max_tokens: int
    ) -> Sequence[int]:
        """The tokens generated, with `request.step` called on each one's logits."""
        ...


class Replay:
    """The tokens of a text that is there, shown to a reader."""

    def __init__(self, token_ids: Sequence[int], reader: CoverReader) -> None:
        self._left = list(reversed(token_ids))
        self._reader = reader

    @property
    def is_done(self) -> bool:
        """Whether no token is left."""
        return not self._left

    @property
    def progress(self) -> CoverProgress:
        """As the reader's."""
        return self._reader.progress

    def choose(self, weights: TokenWeights) -> int:
        """The text's next token. Raises StegoError where the model could not have chosen it."""
        index = index_of(weights, self._left.pop())
        self._reader.observe(weights, index)
        return index


class _Look:
    """Keeps the first distribution that it is shown."""

    progress = CoverProgress(0, 0)

    def __init__(self) -> None:
        self.seen: TokenWeights | None = None

    @property
    def is_done(self) -> bool:
        return self.seen is not None

    def choose(self, weights: TokenWeights) -> int:
        self.seen = weights
        return int(weights.weights.argmax())


def next_token_weights(
    engine: Engine, prompt_ids: Sequence[int], how: Conditioning
) -> TokenWeights:
    """The distribution of the token after the prompt. Raises StegoError."""
    look = _Look()
    request = StegoRequest(look, how, engine.end_token_id)
    engine.generate(prompt_ids, request, 1)
    request.result()
    assert look.seen is not None  # or the result would have said that the engine stopped
    return look.seen


class StegoEncoder:
    """Hides messages in an engine's texts, and reads them."""

    def __init__(
        self,
        engine: Engine,
        secret: Secret,
        codec: str = DEFAULT_CODEC,
        how: Conditioning | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
    ) -> None:
        """Whoever reads needs the same of all; `codec` as for `parse_codec`. Raises StegoError."""
        given = how or Conditioning()
        excluded = {*given.excluded, *engine.special_token_ids, engine.end_token_id}
        self._how = Conditioning(given.params, tuple(sorted(excluded)))
        self._engine = engine
        self._secret = secret
        self._codec = parse_codec(codec)
        self._max_tokens = max_tokens
        self._agreed = repr((engine.fingerprint, codec_name(codec), self._how))

    def encode(self, message: str | bytes, prompt: str) -> str:
        """A text that follows the prompt, from which `decode` has read the message already.

        Raises StegoError, with what to change, if there is none.
        """
        content = message.encode() if isinstance(message, str) else message
        prompt_ids = self._prompt_ids(prompt)
        fault = StegoError(
            f"none of {NUM_TRIES} texts became the tokens again that it was made of; a shorter "
            "message, a lower temperature or a smaller top-k makes that likelier"
        )
        for _ in range(NUM_TRIES):
            text = self._write(content, prompt_ids)
            if text is None:
                continue
            try:
                if self._read(text, prompt_ids) == content:
                    return text
            except StegoError:
                pass
            fault = StegoError("the engine does not compute the same logits twice; make it do so")
        raise fault

    def decode(self, text: str, prompt: str) -> bytes:
        """The message of a text; white space at its end is no part of it. Raises StegoError."""
        return self._read(text.rstrip(), self._prompt_ids(prompt))

    def _prompt_ids(self, prompt: str) -> tuple[int, ...]:
        return tuple(self._engine.tokenizer.encode(prompt))

    def _context(self, prompt_ids: tuple[int, ...]) -> bytes:
        """What a message after this prompt is bound to."""
        return hashlib.sha256(repr((self._agreed, prompt_ids)).encode()).digest()

    def _text_ids(self, text: str) -> tuple[int, ...]:
        if not text:
            raise StegoError("the text is empty")
        return tuple(self._engine.tokenizer.encode(text, add_special_tokens=False))

    def _write(self, content: bytes, prompt_ids: tuple[int, ...]) -> str | None:
        """A text for the message; none if it does not become its tokens again."""
        writer = CoverWriter(seal(content, self._secret, self._context(prompt_ids)), self._codec)
        token_ids = self._run(
            StegoRequest(writer, self._how, self._engine.end_token_id), prompt_ids
        )
        text = self._engine.tokenizer.decode(token_ids)
        is_same = bool(text) and text == text.rstrip() and self._text_ids(text) == token_ids
        return text if is_same else None

    def _read(self, text: str, prompt_ids: tuple[int, ...]) -> bytes:
        token_ids = self._text_ids(text)
        reader = CoverReader(self._secret, self._codec, self._context(prompt_ids))
        request = StegoRequest(Replay(token_ids, reader), self._how, self._engine.end_token_id)
        self._run(request, prompt_ids, len(token_ids))
        if not reader.is_done:
            raise Unreadable
        return reader.message

    def _run(
        self, request: StegoRequest, prompt_ids: tuple[int, ...], max_tokens: int | None = None
    ) -> tuple[int, ...]:
        generated = self._engine.generate(prompt_ids, request, max_tokens or self._max_tokens)
        token_ids = request.result()
        if tuple(generated[: len(token_ids)]) != token_ids:
            raise StegoError(
                "the engine took other tokens than those chosen; switch off speculation, and "
                "whatever changes logits after the callback"
            )
        return token_ids
