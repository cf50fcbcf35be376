"""What endpoints answer, field by field, for whoever documents and whoever checks it.

Answers themselves are written while their tokens come, and not of these.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Answered(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(_Answered):
    """What went wrong; `param` names the field that did."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answered):
    """An error, as OpenAI's clients know it."""

    error: ErrorBody


class OtherAnswer(BaseModel):
    """As the dialect's own documents have it."""

    model_config = ConfigDict(extra="allow")


class TokensDetails(_Answered):
    """Of a prompt's tokens those that had not to be computed."""

    cached_tokens: int


class Usage(_Answered):
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokensDetails


class PromptLogprob(_Answered):
    """What a token had been likely with in its place; its rank, if it is one of the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str


class TokenLogprob(_Answered):
    """A token of a message."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """The one that was chosen, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Answered):
    """Of all tokens of a message."""

    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(_Answered):
    """What a tool is called with: JSON."""

    name: str
    arguments: str


class ToolCall(_Answered):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnsweredMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Answered):
    """One continuation of a conversation."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


_PromptLogprobs = list[dict[str, PromptLogprob] | None]


class ChatCompletion(_Answered):
    """The next message of a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: _PromptLogprobs | None = None


class TextLogprobs(_Answered):
    """Of all tokens of a text, a column each; nothing stands before the first of an echo."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(_Answered):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: _PromptLogprobs | None = None


class Completion(_Answered):
    """What follows a text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Tokens(_Answered):
    """A text's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class Text(_Answered):
    """Tokens' text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What renders conversations; further fields are names of special tokens."""

    tokenizer_class: str
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str


class Embedding(_Answered):
    """A vector of length 1: numbers, or the base64 of F32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Answered):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(_Answered):
    """What texts mean."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(_Answered):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(_Answered):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class Version(_Answered):
    """Of this software."""

    version: str


class Alive(_Answered):
    """The server runs."""

    status: Literal["ok"]


class Health(_Answered):
    """Whether a token could be computed now, and which stages are awaited for that."""

    status: Literal["starting", "ready", "recovering", "away", "leaving"]
    awaited: list[dict[str, Any]]


class StegoStatistics(_Answered):
    """Of a message in a text."""

    bits: int
    entropy_bits: float
    retries: int
    seconds: float


class StegoUsage(_Answered):
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class StegoText(_Answered):
    """A text that carries a message."""

    object: Literal["stego.text"]
    text: str
    model: str
    usage: StegoUsage
    statistics: StegoStatistics


class StegoMessage(_Answered):
    """The message of a text, as text where it is one."""

    object: Literal["stego.message"]
    message: str | None
    message_base64: str
    model: str
    usage: StegoUsage
    statistics: StegoStatistics
