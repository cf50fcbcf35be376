"""The items that OpenAI's responses are made of, as a conversation for a chat template."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.gateway.dialects.turns import Turns, text_field, text_of
from pipeline.gateway.errors import invalid, unsupported

# By its id, one that an earlier answer had.
FindItem = Callable[[str], Mapping[str, Any]]

_MESSAGE_PARTS = frozenset({"input_text", "output_text", "text", "refusal"})
_THOUGHT_PARTS = frozenset({"reasoning_text", "summary_text"})
_ROLES = frozenset({"user", "assistant", "system", "developer"})


def resolved(items: Sequence[Any], find: FindItem) -> Sequence[Mapping[str, Any]]:
    """The items, those in full that are only referred to. Raises ApiError."""
    found = []
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise invalid(f"'input[{i}]' has to be an object.", f"input[{i}]", "invalid_type")
        is_reference = item.get("type") == "item_reference"
        found.append(find(text_field(item, "id", f"input[{i}]")) if is_reference else item)
    return found


def add_items(turns: Turns, items: Sequence[Mapping[str, Any]]) -> None:
    """Add what they say. Raises ApiError."""
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type") or "message"
        reader = _READERS.get(kind) if isinstance(kind, str) else None
        if reader is None:
            raise unsupported(f"{where}.type", f"has to be one of {', '.join(_READERS)} here")
        reader(turns, item, where)


def _message(turns: Turns, item: Mapping[str, Any], where: str) -> None:
    role = text_field(item, "role", where)
    if role not in _ROLES:
        raise invalid(f"'{where}.role' is none of {', '.join(sorted(_ROLES))}.", f"{where}.role")
    turns.say(role, text_of(item.get("content"), _MESSAGE_PARTS, f"{where}.content"))


def _thought(turns: Turns, item: Mapping[str, Any], where: str) -> None:
    """What was thought, or what is left of it."""
    name = "content" if item.get("content") else "summary"
    text = text_of(item.get(name), _THOUGHT_PARTS, f"{where}.{name}")
    if text:
        turns.think(text)


def _call(turns: Turns, item: Mapping[str, Any], where: str) -> None:
    call_id, name, arguments = (
        text_field(item, field, where) for field in ("call_id", "name", "arguments")
    )
    turns.call(call_id, name, arguments)


def _result(turns: Turns, item: Mapping[str, Any], where: str) -> None:
    text = text_of(item.get("output"), _MESSAGE_PARTS, f"{where}.output")
    turns.result(text_field(item, "call_id", where), text)


_READERS: Mapping[str, Callable[[Turns, Mapping[str, Any], str], None]] = {
    "message": _message,
    "reasoning": _thought,
    "function_call": _call,
    "function_call_output": _result,
}
