"""Anthropic's requests for messages in JSON, and the order each makes."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.gateway.chat_messages import Schema
from pipeline.gateway.dialects.turns import (
    Turns,
    sampling_of,
    text_field,
    text_of,
    thinking_variables,
)
from pipeline.gateway.errors import invalid, unsupported
from pipeline.gateway.generation_order import Conversation, Order
from pipeline.gateway.grammars import Grammar
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.structured_output import json_grammar
from pipeline.gateway.tool_use import ToolUse, tool_use
from pipeline.gateway.unsupported_fields import check_fields

# Bookkeeping, where and how fast an answer is made, and what makes long conversations cheaper.
_BOOKKEEPING = frozenset(
    {"metadata", "service_tier", "inference_geo", "speed", "diagnostics", "user_profile_id",
     "workspace_id", "cache_control", "context_management"}
)  # fmt: skip
# Where tokens are counted, how an answer to them is made.
_HARMLESS = _BOOKKEEPING | {
    "max_tokens", "stream", "stop_sequences", "temperature", "top_p", "top_k"
}  # fmt: skip
_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {"mcp_servers": ([],)}
_TEXT = frozenset({"text"})
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TOOL_FIELDS = frozenset(
    {"type", "name", "description", "input_schema", "cache_control", "strict", "input_examples",
     "eager_input_streaming", "defer_loading", "allowed_callers"}
)  # fmt: skip


class _Turn(Schema):
    role: Literal["user", "assistant", "system"]
    content: str | list[Any]


class CountRequest(Schema):
    """The body of `/v1/messages/count_tokens`, and most of that of `/v1/messages`."""

    model: str
    messages: Annotated[list[_Turn], Field(min_length=1)]
    system: str | list[Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _miss_no_effect(self) -> "CountRequest":
        check_fields(self.model_extra or {}, _WITHOUT_EFFECT, _HARMLESS)
        return self

    @property
    def shows_thoughts(self) -> bool:
        """Whether what the model thinks is part of the answer: where that is asked for."""
        asked = self.thinking or {"type": "disabled"}
        return asked.get("type") != "disabled" and asked.get("display") != "omitted"

    def conversation(self, config: GatewayConfig) -> Conversation:
        """What is to be answered, or gone on with. Raises ApiError."""
        turns = Turns()
        if self.system:
            turns.say("system", text_of(self.system, _TEXT, "system"))
        for i, turn in enumerate(self.messages):
            _add_turn(turns, turn, f"messages[{i}]")
        effort = (self.output_config or {}).get("effort")
        if not isinstance(effort, str | None):
            raise invalid("'output_config.effort' has to be a string.", "output_config.effort")
        thinks = (self.thinking or {}).get("type", "disabled") != "disabled"
        return Conversation(
            turns.for_template(),
            continues_last=self.messages[-1].role == "assistant",
            adds_turn=self.messages[-1].role != "assistant",
            variables=thinking_variables(config.chat_template, thinks=thinks, effort=effort),
            tools=self._tool_use(),
        )

    def order(self, config: GatewayConfig) -> Order:
        """What has these tokens. Raises ApiError."""
        return Order(model=self.model, sampling=(), conversation=self.conversation(config))

    def _tool_use(self) -> ToolUse | None:
        tools = [_nested(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())]
        asked = self.tool_choice or {}
        kind = asked.get("type", "auto")
        choice: object = _CHOICES.get(kind) if isinstance(kind, str) else None
        if kind == "tool":
            name = text_field(asked, "name", "tool_choice")
            choice = {"type": "function", "function": {"name": name}}
        if choice is None:
            raise unsupported("tool_choice.type", "has to be auto, any, none or tool here")
        return tool_use(tools, choice, not asked.get("disable_parallel_tool_use"))


class MessagesRequest(CountRequest):
    """The body of `/v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def order(self, config: GatewayConfig) -> Order:
        """What this asks the desk for. Raises ApiError."""
        sampling = sampling_of(
            config.sampling_defaults,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop_sequences or ()),
        )
        return Order(
            model=self.model,
            sampling=(sampling,),
            conversation=self.conversation(config),
            max_tokens=self.max_tokens,
            grammar=self._grammar(),
        )

    def _grammar(self) -> Grammar | None:
        name, format_ = "output_config.format", (self.output_config or {}).get("format")
        if self.output_format is not None:  # its older place
            name, format_ = "output_format", self.output_format
        if format_ is None:
            return None
        if not isinstance(format_, dict) or format_.get("type") != "json_schema":
            raise unsupported(f"{name}.type", "has to be json_schema here")
        return json_grammar(format_.get("schema"), f"{name}.schema")


def _add_turn(turns: Turns, turn: _Turn, where: str) -> None:
    """Add what it says. Raises ApiError."""
    if isinstance(turn.content, str):
        turns.say(turn.role, turn.content)
        return
    texts: list[str] = []
    for i, block in enumerate(turn.content):
        place = f"{where}.content[{i}]"
        kind = text_field(block, "type", place)
        if kind == "text":
            texts.append(text_field(block, "text", place))
        elif kind in _BLOCKS:
            _BLOCKS[kind](turns, block, place)
        else:
            known = ", ".join(["text", *_BLOCKS])
            raise unsupported(f"{place}.type", f"has to be one of {known} here")
    if texts:  # behind results, which are turns of their own
        turns.say(turn.role, "\n".join(texts))


def _thought(turns: Turns, block: Mapping[str, Any], where: str) -> None:
    turns.think(text_field(block, "thinking", where))


def _forgotten(turns: Turns, block: Mapping[str, Any], where: str) -> None:
    """What nobody but the other service can read."""


def _call(turns: Turns, block: Mapping[str, Any], where: str) -> None:
    given = block.get("input")
    if not isinstance(given, dict):
        raise invalid(f"'{where}.input' has to be an object.", f"{where}.input", "invalid_type")
    turns.call(text_field(block, "id", where), text_field(block, "name", where), given)


def _result(turns: Turns, block: Mapping[str, Any], where: str) -> None:
    text = text_of(block.get("content"), _TEXT, f"{where}.content")
    turns.result(text_field(block, "tool_use_id", where), text)


_BLOCKS: Mapping[str, Callable[[Turns, Mapping[str, Any], str], None]] = {
    "thinking": _thought,
    "redacted_thinking": _forgotten,
    "tool_use": _call,
    "tool_result": _result,
}


def _nested(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A tool as chat completions and templates write it. Raises ApiError."""
    if tool.get("type") not in (None, "custom"):
        raise unsupported(f"{where}.type", "has to be custom here")
    check_fields(tool, {}, _TOOL_FIELDS, f"{where}.")
    function = {"name": text_field(tool, "name", where), "parameters": tool.get("input_schema")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}
