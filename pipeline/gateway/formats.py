"""The two shapes of answer: chat completions and text completions."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from pipeline.gateway.choices import PlacedToken, TextPiece
from pipeline.gateway.text import GatewayTokenizer

# JSON has no infinities; OpenAI writes an impossible token's logprob so.
_IMPOSSIBLE = -9999.0


class Format(Protocol):
    """How one endpoint writes its choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its text."""
        ...

    def delta(self, piece: TextPiece) -> dict[str, Any]:
        """What a stream says of one piece."""
        ...

    def whole(
        self, choice: int, text: str, tokens: Sequence[PlacedToken], finish: str | None
    ) -> dict[str, Any]:
        """A whole choice at once."""
        ...


class ChatFormat:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: GatewayTokenizer, has_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The role of who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, piece: TextPiece) -> dict[str, Any]:
        """The piece's text; nothing more when there is none."""
        return {
            "index": piece.choice,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece.tokens) if piece.tokens else None,
            "finish_reason": piece.finish,
        }

    def whole(
        self, choice: int, text: str, tokens: Sequence[PlacedToken], finish: str | None
    ) -> dict[str, Any]:
        """The whole message."""
        return {
            "index": choice,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish,
        }

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        outputs = [placed.output for placed in tokens]
        content = [
            self._token(output.token_id, output.logprob)
            | {"top_logprobs": [self._token(*pair) for pair in output.top]}
            for output in outputs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }


class CompletionFormat:
    """`/v1/completions`; `echoes` holds what is put before each choice's text."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self, tokenizer: GatewayTokenizer, has_logprobs: bool, echoes: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._echoes = echoes

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The prompt, if it is to be repeated."""
        echo = self._echoes[choice]
        return self._choice(choice, echo, (), None) if echo else None

    def delta(self, piece: TextPiece) -> dict[str, Any]:
        """The piece's text."""
        return self._choice(piece.choice, piece.text, piece.tokens, piece.finish)

    def whole(
        self, choice: int, text: str, tokens: Sequence[PlacedToken], finish: str | None
    ) -> dict[str, Any]:
        """The whole text."""
        return self._choice(choice, self._echoes[choice] + text, tokens, finish)

    def _choice(
        self, choice: int, text: str, tokens: Sequence[PlacedToken], finish: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(tokens) if self._has_logprobs else None
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[PlacedToken]) -> dict[str, Any]:
        outputs = [placed.output for placed in tokens]
        return {
            "tokens": [self._text(output.token_id) for output in outputs],
            "token_logprobs": [_finite(output.logprob) for output in outputs],
            "top_logprobs": [
                {self._text(token_id): _finite(logprob) for token_id, logprob in output.top}
                for output in outputs
            ],
            "text_offset": [placed.offset for placed in tokens],
        }

    def _text(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # part of a character; OpenAI shows its bytes
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else _IMPOSSIBLE
