"""A conversation as the text its model was trained on: the model's own Jinja chat template."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import PromptError, TokenizerError
from pipeline.files import is_file

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_CONFIG_BYTES = 16 << 20  # those listing a large vocabulary's added tokens are a few MiB
# Far beyond any context, far below what would hurt: a template may loop over its own input.
MAX_RENDERED_CHARS = 8 << 20

# For models that came without one: base models continue a transcript.
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained on; rendering shows it as it is."""

    tags = {"generation"}  # noqa: RUF012  (as the base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    template: Template
    special_tokens: Mapping[str, str]

    @classmethod
    def load(cls, model_dir: Path) -> "ChatTemplate":
        """The template of a model directory. Raises TokenizerError if what is there is unusable.

        `chat_template.jinja` wins over tokenizer_config.json, as it does for transformers.
        """
        config = _read_config(model_dir / TOKENIZER_CONFIG)
        file = model_dir / TEMPLATE_FILE
        source = _read(file) if is_file(file) else _source(config.get("chat_template"))
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
        # The template comes with the model, from strangers: the sandbox keeps it off the host.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            return cls(environment.from_string(source), dict(special_tokens))
        except TemplateError as error:
            raise TokenizerError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that asks for the next message. Raises PromptError."""
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self.template.generate(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            ):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS:
                    raise PromptError(f"the conversation exceeds {MAX_RENDERED_CHARS} characters")
        except PromptError:
            raise
        except Exception as error:  # a template is a program: on input it forgot, anything happens
            reason = error.message if isinstance(error, TemplateError) else type(error).__name__
            raise PromptError(f"the model's chat template refuses these messages: {reason}") from (
                error
            )
        return "".join(parts)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise TokenizerError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not is_file(path):
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
