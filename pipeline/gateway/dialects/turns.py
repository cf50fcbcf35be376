"""Conversations of other dialects on their way to the messages that chat templates expect."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.errors import InputError
from pipeline.gateway.chat_messages import Message
from pipeline.gateway.errors import invalid, unsupported
from pipeline.gateway.templates import ChatTemplate
from pipeline.sampling.params import SamplingParams

_JOINED = {"system", "assistant"}


class Turns:
    """Messages as they are put together: what one speaker says, thinks and calls is one of them.

    So are instructions that follow each other, since templates take one system message.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def say(self, role: str, text: str) -> None:
        """Somebody says this."""
        role = "system" if role == "developer" else role
        message = self._of(role) if role in _JOINED else self._new(role)
        before = message.get("content")
        message["content"] = f"{before}\n\n{text}" if before else text

    def think(self, text: str) -> None:
        """The model thinks this aloud."""
        message = self._of("assistant")
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def call(self, call_id: str, name: str, arguments: str | Mapping[str, Any]) -> None:
        """The model calls a tool with this: JSON, or what it stands for."""
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._of("assistant").setdefault("tool_calls", []).append(call)

    def result(self, call_id: str, text: str, name: str | None = None) -> None:
        """A call's tool gives this."""
        message = self._new("tool")
        message |= {"tool_call_id": call_id, "content": text}
        if name is not None:
            message["name"] = name

    def for_template(self) -> Sequence[Mapping[str, Any]]:
        """All messages."""
        return [Message(**message).for_template() for message in self._messages]

    def _of(self, role: str) -> dict[str, Any]:
        if self._messages and self._messages[-1]["role"] == role:
            return self._messages[-1]
        return self._new(role)

    def _new(self, role: str) -> dict[str, Any]:
        self._messages.append({"role": role})
        return self._messages[-1]


def text_of(content: object, kinds: Collection[str], param: str) -> str:
    """What content says that is text, or parts of these kinds. Raises ApiError."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = []
    for i, part in enumerate(parts):
        where = f"{param}[{i}]"
        kind = text_field(part, "type", where)
        if kind not in kinds:
            raise unsupported(f"{where}.type", f"has to be {' or '.join(sorted(kinds))} here")
        texts.append(text_field(part, "refusal" if kind == "refusal" else "text", where))
    return "\n".join(texts)


def text_field(part: object, name: str, where: str) -> str:
    """A field of an object that has to be there and text. Raises ApiError."""
    if not isinstance(part, dict):
        raise invalid(f"'{where}' has to be an object.", where, "invalid_type")
    value = part.get(name)
    if not isinstance(value, str):
        raise invalid(f"'{where}.{name}' has to be a string.", f"{where}.{name}", "invalid_type")
    return value


def sampling_of(defaults: Mapping[str, float], **given: Any) -> SamplingParams:  # noqa: ANN401
    """How tokens are chosen; `given`: what the client says, None where nothing. Raises ApiError."""
    said = {name: value for name, value in given.items() if value is not None}
    wanted: dict[str, Any] = {**defaults, **said}
    wanted["top_k"] = int(wanted.get("top_k", 0))
    try:
        return SamplingParams(**wanted)
    except InputError as error:
        raise invalid(f"{error}.", None) from error


def thinking_variables(
    template: ChatTemplate, *, thinks: bool | None, effort: str | None = None
) -> Mapping[str, Any]:
    """What tells a template whether, and how hard, the model is to think; where it reads that."""
    wanted = {"enable_thinking": thinks, "thinking": thinks, "reasoning_effort": effort}
    return {
        name: value
        for name, value in wanted.items()
        if value is not None and name in template.variables
    }
