"""OpenAI's requests for responses in JSON, and the order each makes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.gateway.chat_messages import Schema
from pipeline.gateway.dialects.responses_items import FindItem, add_items, resolved
from pipeline.gateway.dialects.turns import Turns, sampling_of, thinking_variables
from pipeline.gateway.errors import invalid, unsupported
from pipeline.gateway.generation_order import Conversation, Order
from pipeline.gateway.grammars import Grammar
from pipeline.gateway.openai_requests import MAX_LOGPROBS
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.structured_output import any_object, json_grammar
from pipeline.gateway.tool_use import ToolUse, tool_use
from pipeline.gateway.unsupported_fields import HARMLESS, check_fields

_LOGPROBS = "message.output_text.logprobs"
# Beside what concerns bookkeeping: what bounds or shows tools that the service itself would run.
_HARMLESS = HARMLESS | {"max_tool_calls", "prompt_cache_options", "stream_options"}
_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {"background": (False,)}
_THINKS_NOT = frozenset({"none", "minimal"})
_TOOL_FIELDS = ("name", "description", "parameters", "strict")


class ResponsesRequest(Schema):
    """The body of `/v1/responses`.

    A conversation longer than the context is refused, also with `truncation: auto`.
    """

    model: str | None = None
    input: str | list[Any] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _miss_no_effect(self) -> "ResponsesRequest":
        check_fields(self.model_extra or {}, _WITHOUT_EFFECT, _HARMLESS)
        return self

    def items(self, find: FindItem) -> Sequence[Mapping[str, Any]]:
        """What is new in this conversation; `find`: what is referred to. Raises ApiError."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return resolved(self.input, find)

    def order(self, config: GatewayConfig, items: Sequence[Mapping[str, Any]]) -> Order:
        """What this asks the desk for, in a conversation of these items. Raises ApiError."""
        turns = Turns()
        if self.instructions:
            turns.say("system", self.instructions)
        add_items(turns, items)
        messages = turns.for_template()
        if not messages:
            raise invalid("There is nothing to answer: give 'input'.", "input")
        sampling = sampling_of(
            config.sampling_defaults,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=self.num_logprobs,
        )
        conversation = Conversation(
            messages,
            variables=self._variables(config),
            tools=self._tool_use(),
            param="input",
        )
        return Order(
            model=self.model,
            sampling=(sampling,),
            conversation=conversation,
            max_tokens=self.max_output_tokens,
            max_tokens_param="max_output_tokens",
            grammar=self._grammar(),
        )

    @property
    def num_logprobs(self) -> int | None:
        """As SamplingParams wants it."""
        is_asked = _LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if is_asked or self.top_logprobs else None

    def _variables(self, config: GatewayConfig) -> Mapping[str, Any]:
        effort = (self.reasoning or {}).get("effort")
        if not isinstance(effort, str | None):
            raise invalid("'reasoning.effort' has to be a string.", "reasoning.effort")
        thinks = None if effort is None else effort not in _THINKS_NOT
        return thinking_variables(config.chat_template, thinks=thinks, effort=effort)

    def _grammar(self) -> Grammar | None:
        fields = dict(self.text or {})
        format_ = fields.pop("format", None)
        check_fields(fields, {"verbosity": ("medium",)}, where="text.")
        if format_ is None:
            return None
        kind = format_.get("type") if isinstance(format_, dict) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return any_object("text.format")
        if kind != "json_schema":
            raise unsupported("text.format.type", "has to be text, json_object or json_schema here")
        return json_grammar(format_.get("schema"), "text.format.schema")

    def _tool_use(self) -> ToolUse | None:
        tools = [_nested(tool, f"tools[{i}]") for i, tool in enumerate(self.tools or ())]
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
        return tool_use(tools, choice, self.parallel_tool_calls)


def _nested(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A tool as chat completions and templates write it. Raises ApiError."""
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type", "has to be function here")
    check_fields(tool, {}, frozenset({"type", *_TOOL_FIELDS}), f"{where}.")
    function = {name: tool[name] for name in _TOOL_FIELDS if tool.get(name) is not None}
    return {"type": "function", "function": function}
