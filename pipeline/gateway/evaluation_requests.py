"""What is asked of prompts beside what follows them: their tokens, and what they mean.

As vLLM has tokenize and detokenize, and OpenAI embeddings.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.engine.prompt_reader import PromptMeaning
from pipeline.gateway.chat_messages import Message, Schema
from pipeline.gateway.errors import invalid
from pipeline.gateway.field_types import Prompts
from pipeline.gateway.generation_order import Conversation, Order
from pipeline.gateway.openai_requests import MAX_VARIABLES
from pipeline.gateway.tool_use import tool_use
from pipeline.gateway.unsupported_fields import HARMLESS, WITHOUT_EFFECT, check_fields
from pipeline.sampling.params import SamplingParams

# That can be turned into text at once: a second's work.
MAX_TOKENS = 1 << 17
_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Asked(Schema):
    model: str | None = None

    @model_validator(mode="after")
    def _miss_no_effect(self) -> "_Asked":
        check_fields(self.model_extra or {}, WITHOUT_EFFECT, HARMLESS)
        return self


class TokenizeRequest(_Asked):
    """The body of `/tokenize`: a prompt, or the messages of a conversation."""

    prompt: str | None = None
    messages: Annotated[tuple[Message, ...] | None, Field(min_length=1)] = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_VARIABLES)] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise invalid("Give either prompt or messages.", "prompt")
        for i, message in enumerate(self.messages or ()):
            message.check_fields(f"messages[{i}].")
        return self

    def order(self) -> Order:
        """What is to be encoded."""
        conversation = None
        if self.messages is not None:
            conversation = Conversation(
                [message.for_template() for message in self.messages],
                adds_turn=self.add_generation_prompt is not False,
                continues_last=bool(self.continue_final_message),
                variables=self.chat_template_kwargs or {},
                tools=tool_use(self.tools, None, None),
            )
        return Order(
            model=self.model,
            sampling=(),
            conversation=conversation,
            prompts=() if self.prompt is None else (self.prompt,),
            adds_special_tokens=self.add_special_tokens,
            only_encodes=True,
        )


class DetokenizeRequest(_Asked):
    """The body of `/detokenize`."""

    tokens: Annotated[list[_TokenId], Field(max_length=MAX_TOKENS)]


class EmbeddingRequest(_Asked):
    """The body of `/v1/embeddings`; `pooling` is our own.

    `dimensions`: so many of a vector's numbers, the first ones.
    """

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    pooling: Literal["mean", "last"] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None

    @model_validator(mode="after")
    def _leave_something(self) -> "EmbeddingRequest":
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens leaves no prompt.", "truncate_prompt_tokens")
        return self

    def order(self) -> Order:
        """What is to be read."""
        is_mean = self.pooling != "last"
        return Order(
            model=self.model,
            sampling=(SamplingParams(),),
            prompts=self.input,
            prompts_param="input",
            max_tokens=0,
            truncates_to=self.truncate_prompt_tokens,
            adds_special_tokens=self.add_special_tokens,
            reader=partial(PromptMeaning.of, is_mean=is_mean),
        )
