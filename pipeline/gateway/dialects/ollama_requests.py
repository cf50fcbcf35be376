"""Ollama's requests in JSON, and the order each makes.

Options that say how a model is run, and not what it says, change nothing here. Penalties look
at the whole text.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.gateway.chat_messages import Schema
from pipeline.gateway.dialects.turns import Turns, sampling_of, text_field, thinking_variables
from pipeline.gateway.errors import invalid
from pipeline.gateway.generation_order import Conversation, Order
from pipeline.gateway.grammars import Grammar
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.structured_output import any_object, json_grammar
from pipeline.gateway.tool_use import tool_use
from pipeline.gateway.unsupported_fields import WITHOUT_EFFECT, check_fields
from pipeline.sampling.params import SamplingParams

# What a model's name has behind it where nothing else is said.
LATEST = ":latest"
_HARMLESS = frozenset({"keep_alive"})
_WITHOUT_EFFECT: Mapping[str, tuple[object, ...]] = {
    "images": ([],),
    "suffix": ("",),
    "template": ("",),
    "context": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
}
_HARMLESS_OPTIONS = frozenset(
    {"num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "numa", "low_vram",
     "f16_kv", "vocab_only", "use_mmap", "use_mlock", "repeat_last_n", "penalize_newline"}
)  # fmt: skip


class _Options(Schema):
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    num_predict: int | None = None

    @model_validator(mode="after")
    def _miss_no_effect(self) -> "_Options":
        check_fields(self.model_extra or {}, WITHOUT_EFFECT, _HARMLESS_OPTIONS, "options.")
        return self

    @property
    def max_tokens(self) -> int | None:
        """None, as many as there is room for: also said by a negative number."""
        return None if self.num_predict is None or self.num_predict < 0 else self.num_predict

    def sampling(self, config: GatewayConfig) -> SamplingParams:
        """How tokens are chosen. Raises ApiError."""
        stops = self.stop or ()
        return sampling_of(
            config.sampling_defaults,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=(stops,) if isinstance(stops, str) else tuple(stops),
        )


class _Request(Schema):
    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: _Options = _Options()
    think: bool | Literal["low", "medium", "high"] | None = None

    @field_validator("options", mode="before")
    @classmethod
    def _know_options(cls, value: object) -> object:
        return {} if value is None else value

    @model_validator(mode="after")
    def _miss_no_effect(self) -> "_Request":
        check_fields(self.model_extra or {}, _WITHOUT_EFFECT, _HARMLESS)
        return self

    @property
    def shows_thoughts(self) -> bool:
        """Whether what the model thinks is part of the answer."""
        return self.think is not False

    def _order(self, config: GatewayConfig, **fields: Any) -> Order:  # noqa: ANN401  (Order's own)
        return Order(
            model=self.model.removesuffix(LATEST),
            sampling=(self.options.sampling(config),),
            max_tokens=self.options.max_tokens,
            max_tokens_param="options.num_predict",
            grammar=self._grammar(),
            **fields,
        )

    def _grammar(self) -> Grammar | None:
        if not self.format:
            return None
        return (
            any_object("format") if self.format == "json" else json_grammar(self.format, "format")
        )

    def _variables(self, config: GatewayConfig) -> Mapping[str, Any]:
        effort = self.think if isinstance(self.think, str) else None
        thinks = None if self.think is None else bool(self.think)
        return thinking_variables(config.chat_template, thinks=thinks, effort=effort)


class OllamaChatRequest(_Request):
    """The body of `/api/chat`."""

    is_chat: ClassVar = True

    messages: list[dict[str, Any]] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None

    @property
    def asks_nothing(self) -> bool:
        """Whether the model is only to be there."""
        return not self.messages

    def order(self, config: GatewayConfig) -> Order:
        """What this asks the desk for. Raises ApiError."""
        turns = Turns()
        for i, message in enumerate(self.messages):
            _add_message(turns, message, f"messages[{i}]")
        conversation = Conversation(
            turns.for_template(),
            variables=self._variables(config),
            tools=tool_use(self.tools, None, None),
        )
        return self._order(config, conversation=conversation)


class OllamaGenerateRequest(_Request):
    """The body of `/api/generate`."""

    is_chat: ClassVar = False
    prompt: str = ""
    system: str | None = None
    raw: bool | None = None

    @property
    def asks_nothing(self) -> bool:
        """Whether the model is only to be there."""
        return not self.prompt

    def order(self, config: GatewayConfig) -> Order:
        """What this asks the desk for. Raises ApiError."""
        if self.raw:
            return self._order(config, prompts=(self.prompt,))
        turns = Turns()
        if self.system:
            turns.say("system", self.system)
        turns.say("user", self.prompt)
        conversation = Conversation(
            turns.for_template(), variables=self._variables(config), param="prompt"
        )
        return self._order(config, conversation=conversation)


class OllamaShowRequest(Schema):
    """The body of `/api/show`; `name` is an older name of `model`."""

    model: str | None = None
    name: str | None = None


def _add_message(turns: Turns, message: Mapping[str, Any], where: str) -> None:
    role, text = text_field(message, "role", where), message.get("content") or ""
    if role not in {"system", "user", "assistant", "tool"}:
        raise invalid(f"'{where}.role' is none of system, user, assistant, tool.", f"{where}.role")
    if not isinstance(text, str):
        raise invalid(f"'{where}.content' has to be a string.", f"{where}.content", "invalid_type")
    check_fields({"images": message.get("images")}, {"images": ([],)}, where=f"{where}.")
    name, calls = message.get("tool_name"), message.get("tool_calls") or ()
    if role == "tool":
        turns.result("", text, name if isinstance(name, str) else None)
        return
    if not isinstance(calls, list | tuple):
        place = f"{where}.tool_calls"
        raise invalid(f"'{place}' has to be a list.", place, "invalid_type")
    thoughts = message.get("thinking")
    if isinstance(thoughts, str) and thoughts:
        turns.think(thoughts)
    if text or not calls:
        turns.say(role, text)
    for i, call in enumerate(calls):
        place = f"{where}.tool_calls[{i}].function"
        function = call.get("function") if isinstance(call, dict) else None
        name = text_field(function, "name", place)
        given = function.get("arguments") if isinstance(function, dict) else None
        turns.call("", name, given if isinstance(given, dict) else {})
