"""The tools a conversation may use, and how the model is to use them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.gateway.errors import invalid, unsupported
from pipeline.gateway.unsupported_fields import check_fields

MAX_TOOLS = 256
# OpenAI's.
MAX_NAME_CHARS = 64
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools as clients and templates write them; `must`: an answer is calls of these and no text.

    `at_most_one`: an answer ends with its first call.
    """

    tools: Sequence[Mapping[str, Any]]
    must: bool = False
    at_most_one: bool = False
    # Of the tools, the one that is to be called.
    named: str | None = None

    @property
    def parameters(self) -> Mapping[str, Mapping[str, Any]]:
        """By the name of each tool that may be called, the schema of what it is called with."""
        found = {}
        for tool in self.tools:
            function = tool["function"]
            if self.named in {None, function["name"]}:
                found[function["name"]] = function.get("parameters") or _NO_PARAMETERS
        return found


def tool_use(
    tools: Sequence[Mapping[str, Any]] | None, choice: object, parallel: bool | None
) -> ToolUse | None:
    """What a request's fields say; None: no tools. Raises ApiError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid("'tool_choice' needs tools.", "tool_choice")
        return None
    if len(tools) > MAX_TOOLS:
        raise invalid(f"At most {MAX_TOOLS} tools can be given.", "tools")
    names = [_name(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    if len(set(names)) < len(names):
        raise invalid("Two tools have the same name.", "tools")
    at_most_one = parallel is False
    if choice in (None, "auto"):
        return ToolUse(tools, at_most_one=at_most_one)
    if choice == "none":
        return None
    if choice == "required":
        return ToolUse(tools, must=True, at_most_one=at_most_one)
    named = _named(choice)
    if named not in names:
        raise invalid(f"There is no tool {named[:MAX_NAME_CHARS]!r}.", "tool_choice")
    return ToolUse(tools, must=True, at_most_one=True, named=named)


def _name(tool: Mapping[str, Any], where: str) -> str:
    if tool.get("type", "function") != "function":
        raise unsupported(f"{where}.type", "has to be function here")
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise invalid(f"'{where}.function' has to be an object with a name.", f"{where}.function")
    is_plain = all(char.isascii() and (char.isalnum() or char in "_-.") for char in name)
    if not 0 < len(name) <= MAX_NAME_CHARS or not is_plain:
        raise invalid(
            f"A tool's name has 1 to {MAX_NAME_CHARS} letters, digits, '_', '-' and '.'.",
            f"{where}.function.name",
        )
    if not isinstance(function.get("parameters"), dict | None):
        raise invalid("Parameters are a JSON schema, an object.", f"{where}.function.parameters")
    known = frozenset({"name", "description", "parameters", "strict"})
    check_fields(function, {}, known, f"{where}.function.")
    return name


def _named(choice: Any) -> str:  # noqa: ANN401  (of JSON)
    is_function = isinstance(choice, dict) and choice.get("type") == "function"
    function = choice.get("function") if is_function else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise unsupported("tool_choice", "has to be none, auto, required or one function here")
    return name
