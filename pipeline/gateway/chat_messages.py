"""One turn of a conversation, as OpenAI's clients send it and as chat templates expect it."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from pipeline.gateway.unsupported_fields import (
    MESSAGE_HARMLESS,
    MESSAGE_WITHOUT_EFFECT,
    check_fields,
)


class Schema(BaseModel):
    """What clients send: values of the right type only, further fields kept to be judged."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}, {"type": "null"}]
}


class Message(Schema):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | None, WithJsonSchema(_CONTENT_SCHEMA)] = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) < len(value) or any(part.get("type") != "text" for part in value):
            raise PydanticCustomError("part_value", "Only parts of type text are supported")
        return "\n".join(texts)

    def check_fields(self, where: str) -> None:
        """Raise ApiError that names the first field whose effect would be missed."""
        check_fields(self.model_extra or {}, MESSAGE_WITHOUT_EFFECT, MESSAGE_HARMLESS, where)

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it.

        They know the older name of the developer's role, and want what a tool was called with as
        values, not as the JSON text that models write and clients send.
        """
        message = self.model_dump(exclude_none=True, include=set(Message.model_fields))
        role = "system" if self.role == "developer" else self.role
        message |= {"role": role, "content": self.content or ""}
        if self.tool_calls:
            message["tool_calls"] = [_decoded(call) for call in self.tool_calls]
        return message


def _decoded(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    text = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(text, str):
        return call
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return call  # a mistake of the model's, and as such part of the conversation
    return call | {"function": function | {"arguments": arguments}}
