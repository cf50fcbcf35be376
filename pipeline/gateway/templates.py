"""A conversation as the text its model was trained on: the model's own Jinja chat template."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import PromptError, TokenizerError
from pipeline.gateway import template_renderer
from pipeline.gateway.errors import unsupported
from pipeline.gateway.kept_process import KeptProcess
from pipeline.gguf.model_files import has_model_file, read_model_file

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 16 << 20  # those listing a large vocabulary's added tokens are a few MiB
# What every rendering sets itself.
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})

# For models that came without one: base models continue a transcript.
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class ChatTemplate:
    """A template, compiled in a process that is kept for it, and the special tokens it may name.

    May be used from several threads; they take turns.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile it. Raises TokenizerError."""
        self.special_tokens = dict(special_tokens)
        self._start_values = (source, self.special_tokens)
        self._turn = threading.Lock()
        self._process: _RenderProcess | None = None
        answer = self._started().answer()
        if answer.mark != template_renderer.TEXT:
            self.close()
            raise TokenizerError(f"the model's chat template does not compile: {answer.text}")
        self.source = source
        self._reads = frozenset(json.loads(answer.text))
        # What a client may set: whatever else the template reads.
        self.variables = self._reads - _RESERVED - special_tokens.keys()

    @property
    def reads_tools(self) -> bool:
        """Whether it shows tools, and so calls of them, as the model has learned them."""
        return "tools" in self._reads

    @classmethod
    def load(cls, model_dir: Path) -> "ChatTemplate":
        """The template of a model directory. Raises TokenizerError if what is there is unusable.

        `chat_template.jinja` wins over tokenizer_config.json, as it does for transformers.
        """
        config = _read_config(model_dir / TOKENIZER_CONFIG)
        file = model_dir / TEMPLATE_FILE
        source = _read(file) if has_model_file(file) else _source(config.get("chat_template"))
        if source is None:
            logger.warning(
                "event=no_chat_template dir=%s detail=%r",
                model_dir,
                "the model has no chat template, so chats are shown to it as a plain transcript",
            )
            source = PLAIN
        special = {
            name: _token_text(value) for name, value in config.items() if name.endswith("_token")
        }
        return cls.compile(source, {name: text for name, text in special.items() if text})

    @classmethod
    def compile(cls, source: str, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """Compile a template. Raises TokenizerError."""
        return cls(source, special_tokens)

    def check_variables(self, names: Sequence[str], param: str) -> None:
        """Raise ApiError that names the first variable the template does not read, or that is ours.

        One that it does not read would have no effect, and be missed.
        """
        for name in names:
            if name not in self.variables:
                raise unsupported(f"{param}.{name}", "is nothing this model's chat template reads")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt that asks for the next message. Raises PromptError; blocks for a moment."""
        values = {
            **(variables or {}),
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._turn:
            answer = self._exchange(values)
        if answer.mark != template_renderer.TEXT:
            raise PromptError(f"the model's chat template refuses these messages: {answer.text}")
        return answer.text

    def render_open(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt that goes on with the last message. Raises PromptError; blocks for a moment.

        As transformers has it: the conversation is cut where that message's text ends.
        """
        text = self.render(messages, add_generation_prompt=False, variables=variables, tools=tools)
        last = messages[-1].get("content") or ""
        start = text.rfind(last.strip())
        if start < 0 or not last.strip():
            raise PromptError("the chat template does not show the last message as it is")
        # Templates may trim what they are given.
        is_whole = text.startswith(last.lstrip(), start)
        return text[: start + len(last.lstrip() if is_whole else last.strip())]

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _exchange(self, values: Mapping[str, Any]) -> "_Answer":
        process = self._process
        if process is not None and not process.is_running:  # killed since, for its memory say
            self.close()
            process = None
        if process is None:
            process = self._started()
            process.answer()  # it has compiled before
        answer = process.ask(values)
        if not answer.mark:
            self.close()
            logger.warning("event=chat_template_ended limit_s=%g", template_renderer.RENDER_SECONDS)
        return answer

    def _started(self) -> "_RenderProcess":
        self._process = _RenderProcess()
        self._process.send(self._start_values)
        return self._process


class _Answer(NamedTuple):
    """`mark` is empty if the process ended without one."""

    mark: bytes
    text: str


class _RenderProcess(KeptProcess):
    """`template_renderer.py`, running."""

    def __init__(self) -> None:
        super().__init__(Path(template_renderer.__file__))

    def send(self, value: object) -> None:
        """Give it something to do."""
        with suppress(OSError):  # it has ended; so does its answer
            template_renderer.write_value(self.requests, value)

    def ask(self, value: object) -> _Answer:
        """Have something rendered."""
        self.send(value)
        return self.answer()

    def answer(self) -> _Answer:
        """Wait for what it says; for what it has ended without, too."""
        try:
            with self.watched():
                return self._read()
        except EOFError:
            return _Answer(b"", "it takes too long, or too much memory")

    def _read(self) -> _Answer:
        stream = self.answers
        size, mark = template_renderer.ANSWER.unpack(
            template_renderer.read_exactly(stream, template_renderer.ANSWER.size)
        )
        if size > template_renderer.MAX_ANSWER_BYTES:
            raise EOFError
        text = template_renderer.read_exactly(stream, size)
        return _Answer(mark, text.decode("utf-8", "replace"))


def _read(path: Path) -> str:
    try:
        raw = read_model_file(path, MAX_CONFIG_BYTES)
        if len(raw) > MAX_CONFIG_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
        return raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not has_model_file(path):
        return {}
    try:
        config = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} is not a JSON object")
    return config


def _source(value: object) -> str | None:
    """The template itself, or of several named ones the default."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        default = named.get("default")
        if isinstance(default, str):
            return default
    raise TokenizerError(f"{TOKENIZER_CONFIG} holds a chat_template that is no template")


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
