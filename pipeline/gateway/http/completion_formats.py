"""The two shapes of answer: chat completions and text completions.

A whole answer is written while its tokens come: writing megabytes of logprobs at its end would hold
up everybody else's tokens.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Protocol

from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.continuations import PlacedToken, TextPiece
from pipeline.gateway.http.prompt_formats import Echo, PromptLogprobs, finite
from pipeline.gateway.tool_parser import CallDelta

# Tokens of a prompt in one event.
_PART_TOKENS = 64
_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class WholeChoice(Protocol):
    """A choice on its way to being whole."""

    def add(self, piece: TextPiece) -> None:
        """Take its next piece."""
        ...

    def to_json(self) -> Iterator[bytes]:
        """All of it, in parts to be joined."""
        ...


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

    def whole(self, choice: int) -> WholeChoice:
        """A choice to be said at once."""
        ...


def dump(value: object) -> bytes:
    """As JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class ChatFormat:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, tokenizer: GatewayTokenizer, has_logprobs: bool, shows_reasoning: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._shows_reasoning = shows_reasoning

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The role of who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, piece: TextPiece) -> dict[str, Any]:
        """The piece's text, thoughts and calls; nothing more when there is none."""
        logprobs = None
        if self._has_logprobs and piece.tokens:
            logprobs = {"content": [self.logprob(each) for each in piece.tokens], "refusal": None}
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.reasoning and self._shows_reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.calls:
            delta["tool_calls"] = [_call(each) for each in piece.calls]
        return {
            "index": piece.choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": piece.finish,
        }

    def whole(self, choice: int) -> WholeChoice:
        """The message."""
        return _WholeMessage(
            choice, self if self._has_logprobs else None, shows_reasoning=self._shows_reasoning
        )

    def logprob(self, placed: PlacedToken) -> dict[str, Any]:
        """What is said of one token."""
        output = placed.output
        top = [self._token(*pair) for pair in output.top]
        return self._token(output.token_id, output.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": finite(logprob),
            "bytes": list(raw),
        }


def _call(part: CallDelta) -> dict[str, Any]:
    function = {"arguments": part.arguments}
    if part.id is None:
        return {"index": part.index, "function": function}
    named = {"name": part.name, **function}
    return {"index": part.index, "id": part.id, "type": "function", "function": named}


class _WholeMessage:
    def __init__(self, choice: int, format_: ChatFormat | None, *, shows_reasoning: bool) -> None:
        self._choice = choice
        self._format = format_  # if there are logprobs
        self._shows_reasoning = shows_reasoning
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        # Of each call its first part, and its arguments.
        self._calls: list[tuple[CallDelta, list[str]]] = []
        self._logprobs: list[bytes] = []
        self._finish: str | None = None

    def add(self, piece: TextPiece) -> None:
        self._texts.append(piece.text)
        self._thoughts.append(piece.reasoning)
        for part in piece.calls:
            if part.id is not None:
                self._calls.append((part, []))
            self._calls[-1][1].append(part.arguments)
        if self._format is not None:
            self._logprobs += [dump(self._format.logprob(placed)) for placed in piece.tokens]
        self._finish = piece.finish

    def to_json(self) -> Iterator[bytes]:
        text, thoughts = "".join(self._texts), "".join(self._thoughts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thoughts and self._shows_reasoning:
            message["reasoning_content"] = thoughts
        if self._calls:
            message["content"] = text or None
            calls = [_call(replace(part, arguments="".join(a))) for part, a in self._calls]
            message["tool_calls"] = [{k: c[k] for k in c if k != "index"} for c in calls]
        yield b'{"index":%d,"message":%b,"logprobs":' % (self._choice, dump(message))
        if self._format is None:
            yield b"null"
        else:
            yield b'{"content":['
            yield from _separated(self._logprobs)
            yield b'],"refusal":null}'
        yield b',"finish_reason":%b}' % dump(self._finish)


class CompletionFormat:
    """`/v1/completions`."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        tokenizer: GatewayTokenizer,
        num_logprobs: int | None,
        echoes: Sequence[Echo],
        prompts: Sequence[PromptLogprobs] = (),
    ) -> None:
        """`echoes`: what is put before each choice's text; `prompts`: what is told beside it."""
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs
        self._echoes = echoes
        self._prompts = prompts

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The prompt, if it is to be repeated; with its logprobs it has to be read before."""
        echo = self._echoes[choice]
        if not echo.text or echo.scores is not None:
            return None
        return self.delta(TextPiece(choice, echo.text, (), None))

    def echoed(self, choice: int) -> Iterator[dict[str, Any]]:
        """The prompt with its logprobs, in parts, if it is to be repeated so."""
        echo = self._echoes[choice]
        tokens = echo.tokens(self._tokenizer, self._num_logprobs or 0)
        part = list(islice(tokens, _PART_TOKENS))
        while part:
            following = list(islice(tokens, _PART_TOKENS))
            end = following[0].offset if following else len(echo.text)
            text = echo.text[part[0].offset : end]
            yield self._said(choice, text, [self.logprob(each) for each in part], None)
            part = following

    def delta(self, piece: TextPiece) -> dict[str, Any]:
        """The piece's text."""
        each = [self.placed(piece.choice, placed) for placed in piece.tokens]
        return self._said(piece.choice, piece.text, each, piece.finish)

    def placed(self, choice: int, placed: PlacedToken) -> dict[str, Any]:
        """What is said of a generated token, which stands behind what is echoed."""
        offset = len(self._echoes[choice].text) + placed.offset
        return self.logprob(replace(placed, offset=offset))

    def _said(
        self, choice: int, text: str, each: Sequence[Mapping[str, Any]], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.has_logprobs:
            logprobs = {name: [logprob[name] for logprob in each] for name in _COLUMNS}
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, choice: int) -> WholeChoice:
        """The text."""
        return _WholeText(choice, self)

    @property
    def has_logprobs(self) -> bool:
        """Whether they are told."""
        return self._num_logprobs is not None

    def echo(self, choice: int) -> str:
        """What is put before a choice's text."""
        return self._echoes[choice].text

    def prompt_columns(self, choice: int) -> Iterator[Mapping[str, Any]]:
        """What is said of each token of a prompt that is echoed."""
        for placed in self._echoes[choice].tokens(self._tokenizer, self._num_logprobs or 0):
            yield self.logprob(placed)

    def prompt_logprobs(self, choice: int) -> Iterator[bytes]:
        """What is told beside a choice: its prompt's, where asked for."""
        if self._prompts:
            yield from told_prompt(self._prompts[choice], self._tokenizer)

    def logprob(self, placed: PlacedToken) -> dict[str, Any]:
        """What is said of one token, by the name of its column."""
        output = placed.output
        return {
            "tokens": self._text(output.token_id),
            "token_logprobs": None if output.logprob is None else finite(output.logprob),
            "top_logprobs": (
                None if output.logprob is None else self._top(output.token_id, output.top)
            ),
            "text_offset": placed.offset,
        }

    def _top(self, chosen: int, top: Sequence[tuple[int, float]]) -> Mapping[str, float]:
        """Logprobs by text, the likeliest first.

        Of tokens that share a text the chosen one has it, or else the likeliest; the others go by
        their number, or they would take its place.
        """
        texts = {token_id: self._text(token_id) for token_id, _ in top}
        owners = {text: token_id for token_id, text in reversed(texts.items())}
        if chosen in texts:
            owners[texts[chosen]] = chosen
        return {
            text if owners[text] == token_id else f"token_id:{token_id}": finite(logprob)
            for (token_id, logprob), text in zip(top, texts.values(), strict=True)
        }

    def _text(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # part of a character; OpenAI shows its bytes
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _WholeText:
    def __init__(self, choice: int, format_: CompletionFormat) -> None:
        self._choice = choice
        self._format = format_
        self._texts = [format_.echo(choice)]
        self._columns: dict[str, list[bytes]] = {name: [] for name in _COLUMNS}
        self._finish: str | None = None

    def add(self, piece: TextPiece) -> None:
        self._texts.append(piece.text)
        if self._format.has_logprobs:
            for placed in piece.tokens:
                for name, value in self._format.placed(self._choice, placed).items():
                    self._columns[name].append(dump(value))
        self._finish = piece.finish

    def to_json(self) -> Iterator[bytes]:
        yield b'{"index":%d,"text":%b,"logprobs":' % (self._choice, dump("".join(self._texts)))
        if self._format.has_logprobs:
            yield from self._logprobs()
        else:
            yield b"null"
        yield b',"finish_reason":%b' % dump(self._finish)
        yield from self._format.prompt_logprobs(self._choice)
        yield b"}"

    def _logprobs(self) -> Iterator[bytes]:
        before: dict[str, list[bytes]] = {name: [] for name in _COLUMNS}
        for column in self._format.prompt_columns(self._choice):
            for name, value in column.items():
                before[name].append(dump(value))
            yield b""  # each takes a moment, and others have their turn between two
        mark = b"{"
        for name, values in self._columns.items():
            yield b'%b"%b":[' % (mark, name.encode())
            yield from _separated(chain(before[name], values))
            yield b"]"
            mark = b","
        yield b"}"


def _separated(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts of a JSON array, with commas between them."""
    for i, part in enumerate(parts):
        if i:
            yield b","
        yield part


def told_prompt(prompt: PromptLogprobs, tokenizer: GatewayTokenizer) -> Iterator[bytes]:
    """The field that tells of a prompt, in parts, with a comma before it."""
    yield b',"prompt_logprobs":['
    yield from _separated(map(dump, prompt.entries(tokenizer)))
    yield b"]"
