"""OpenAI's requests in JSON: what is read of them, what each field may be, and the order it makes.

Fields that change no answer are accepted; those whose effect would be missed are refused by name.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    FailFast,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.engine.prompt_reader import PromptScores
from pipeline.errors import InputError
from pipeline.gateway.chat_messages import Message, Schema
from pipeline.gateway.errors import ApiError, invalid, unsupported
from pipeline.gateway.field_types import Biases, Prompts, Stops
from pipeline.gateway.generation_order import Conversation, Order
from pipeline.gateway.grammars import Grammar
from pipeline.gateway.sampling_defaults import OPENAI
from pipeline.gateway.structured_output import STRUCTURED, asked_grammar
from pipeline.gateway.tool_use import tool_use
from pipeline.gateway.unsupported_fields import (
    HARMLESS,
    STREAM_WITHOUT_EFFECT,
    WITHOUT_EFFECT,
    check_fields,
)
from pipeline.sampling.choosers import chooser_of
from pipeline.sampling.params import (
    MAX_ALLOWED,
    MAX_STOP_CHARS,
    RANGES,
    SamplingParams,
)

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_VARIABLES = 64
# Of a body, about: so many numbers are no prompt any more, but hold the interpreter for long.
MAX_VALUES = 1 << 18
# What OpenAI generates after a text when not told.
DEFAULT_COMPLETION_TOKENS = 16

_INT64 = 1 << 63
_Count = Annotated[int, Field(ge=1)]
# Of a session's name.
MAX_SESSION_CHARS = 256
_Id = Annotated[int, Field(ge=0, lt=1 << 31)]


def _within(name: str) -> Any:  # noqa: ANN401  (what Field says it returns)
    return Field(ge=RANGES[name].low, le=RANGES[name].high)


class StreamOptions(Schema):
    """How to stream."""

    include_usage: bool | None = None

    @model_validator(mode="after")
    def _miss_no_effect(self) -> "StreamOptions":
        check_fields(self.model_extra or {}, STREAM_WITHOUT_EFFECT, where="stream_options.")
        return self


class _Sampled(Schema):
    """What both endpoints share.

    Beyond OpenAI's fields, as vLLM has them: prompt_logprobs, top_k, min_p, repetition_penalty,
    ignore_eos, min_tokens, allowed_token_ids, bad_words, stop_token_ids,
    include_stop_str_in_output, skip_special_tokens, add_special_tokens, truncate_prompt_tokens,
    cache_salt,
    structured_outputs, its older names guided_*; as llama.cpp has them: grammar, json_schema; and
    our own: chooser, session.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    temperature: Annotated[float, _within("temperature")] | None = None
    top_p: Annotated[float, _within("top_p")] | None = None
    top_k: Annotated[int, _within("top_k")] | None = None
    min_p: Annotated[float, _within("min_p")] | None = None
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, _within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Stops = ()
    logit_bias: Biases = Field(default_factory=dict)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_Id], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_tokens: Annotated[int, _within("min_tokens")] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    session: Annotated[str, Field(min_length=1, max_length=MAX_SESSION_CHARS)] | None = None
    allowed_token_ids: (
        Annotated[tuple[_Id, ...], Field(min_length=1, max_length=MAX_ALLOWED)] | None
    ) = None
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
            Field(max_length=MAX_BAD_WORDS),
        ]
        | None
    ) = None
    chooser: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None

    @field_validator("chooser")
    @classmethod
    def _know_chooser(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            if value is not None:
                chooser_of(value)
        except InputError as error:
            raise PydanticCustomError("chooser_value", "{reason}", {"reason": str(error)}) from None
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "_Sampled":
        check_fields(self.model_extra or {}, WITHOUT_EFFECT, HARMLESS)
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens leaves no prompt.", "truncate_prompt_tokens")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream to be true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise unsupported("prompt_logprobs", "cannot be had with stream")
        if self.max_tokens == 0 and self.num_prompt_top is None:
            raise invalid(
                "max_tokens is 0, and neither echo nor prompt_logprobs asked for.", "max_tokens"
            )
        return self

    @property
    def num_prompt_top(self) -> int | None:
        """How many of the likeliest are told for each token of the prompt, if it is scored."""
        return self.prompt_logprobs

    @property
    def _grammar(self) -> Grammar | None:
        return asked_grammar(
            {name: value for name in STRUCTURED if (value := getattr(self, name)) is not None}
        )

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(
        self, choice: int, logprobs: int | None, defaults: Mapping[str, float] = OPENAI
    ) -> SamplingParams:
        """How to sample the `choice`-th continuation: a seed gives each its own numbers.

        `defaults`: of what the request does not say.
        """

        def wanted(name: str, neutral: float) -> Any:  # noqa: ANN401  (a float or an int)
            given = getattr(self, name)
            return defaults.get(name, neutral) if given is None else given

        return SamplingParams(
            temperature=wanted("temperature", 1.0),
            top_k=int(wanted("top_k", 0)),
            top_p=wanted("top_p", 1.0),
            min_p=wanted("min_p", 0.0),
            repetition_penalty=wanted("repetition_penalty", 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else self.seed + choice,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            stop=self.stop,
            min_tokens=self.min_tokens or 0,
            allowed_token_ids=self.allowed_token_ids,
            chooser=None if self.chooser is None else chooser_of(self.chooser),
        )

    def _order(
        self,
        logprobs: int | None,
        defaults: Mapping[str, float],
        **fields: Any,  # noqa: ANN401  (Order's own)
    ) -> Order:
        top = self.num_prompt_top
        return Order(
            model=self.model,
            sampling=tuple(
                self.sampling(choice, logprobs, defaults) for choice in range(self.n or 1)
            ),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignores_eos=bool(self.ignore_eos),
            truncates_to=self.truncate_prompt_tokens,
            adds_special_tokens=self.add_special_tokens,
            shows_special_tokens=self.skip_special_tokens is False,
            includes_stop=bool(self.include_stop_str_in_output),
            cache_salt=self.cache_salt,
            session=self.session,
            grammar=self._grammar,
            bad_words=tuple(self.bad_words or ()),
            reader=None if top is None else partial(PromptScores, num_top=top),
            **fields,
        )


class ChatRequest(_Sampled):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1), FailFast()]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _refuse_what_is_missing(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other.",
                "continue_final_message",
            )
        if self.echo:
            raise unsupported("echo")
        for i, message in enumerate(self.messages):
            message.check_fields(f"messages[{i}].")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As SamplingParams wants it."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def order(self, defaults: Mapping[str, float] = OPENAI) -> Order:
        """What this asks the desk for; `defaults`: of how tokens are chosen."""
        is_newer = self.max_completion_tokens is not None
        conversation = Conversation(
            [message.for_template() for message in self.messages],
            adds_turn=self.add_generation_prompt is not False,
            continues_last=bool(self.continue_final_message),
            variables=self.chat_template_kwargs or {},
            tools=tool_use(self.tools, self.tool_choice, self.parallel_tool_calls),
            splits_thoughts=self.reasoning_format != "none",
        )
        return self._order(
            self.num_logprobs,
            defaults,
            conversation=conversation,
            max_tokens=self.max_completion_tokens if is_newer else self.max_tokens,
            max_tokens_param="max_completion_tokens" if is_newer else "max_tokens",
        )


class CompletionRequest(_Sampled):
    """The body of `/v1/completions`; a prompt is text or token ids."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _refuse_what_is_missing(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of")
        return self

    @property
    def num_prompt_top(self) -> int | None:
        """See `_Sampled`; what is echoed alone is not scored but where nothing else is computed."""
        echoed = self.logprobs if self.max_tokens != 0 else self.logprobs or 0
        asked = (self.prompt_logprobs, echoed if self.echo else None)
        return max((each for each in asked if each is not None), default=None)

    def order(self, defaults: Mapping[str, float] = OPENAI) -> Order:
        """What this asks the desk for; `defaults`: of how tokens are chosen."""
        return self._order(
            self.logprobs,
            defaults,
            prompts=self.prompt,
            max_tokens=DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
        )


_Body = TypeVar("_Body", bound=Schema)


def parse_untrusted(schema: type[_Body], body: bytes) -> _Body:
    """Read a request body. Raises ApiError that names the first wrong field.

    Attack: a body of millions of values, each of which takes longer to read than its bytes.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise invalid(f"The body holds more than {MAX_VALUES} values.", None, "request_too_complex")
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _refusal(first["type"], first["loc"], first["msg"]) from None


def _refusal(kind: str, location: tuple[int | str, ...], message: str) -> ApiError:
    if kind == "json_invalid":
        return invalid(f"The body is not valid JSON: {message}.", None, "invalid_json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    param = param.lstrip(".")
    if kind == "missing":
        return invalid(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    if not param:
        return invalid("The body is not a JSON object.", None, "invalid_type")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return invalid(f"Invalid value for '{param}': {message}.", param, code)
