"""What a client asks for, however it came in: what every door hands the desk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.engine.prompt_reader import PromptReader
from pipeline.gateway.grammars import Grammar
from pipeline.gateway.tool_use import ToolUse
from pipeline.sampling.params import SamplingParams

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates expect them.

    `adds_turn`: the template begins the next message. `continues_last`: the answer goes on with
    the last one instead. `variables` are what else the template reads. `param`: the request's field
    that it came in.
    """

    messages: Sequence[Mapping[str, Any]]
    adds_turn: bool = True
    continues_last: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: ToolUse | None = None
    # Whether what the model thinks aloud is told apart from what it says.
    splits_thoughts: bool = True
    param: str = "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One request.

    What is to be continued is a conversation, or each of several prompts (text or token ids).
    `model` None: the one there is. `sampling` says for each continuation of a prompt how its tokens
    are chosen, and so how many there are. `max_tokens` None: as many as the context holds.
    `truncates_to`: of a longer prompt, its last so many tokens; -1 for as many as fit.
    `adds_special_tokens` None: as is usual. `cache_salt`: prompts go on from those of its caller's
    that had the same. `session`: its caller's name for what is kept of the text, for a prompt that
    begins with it. `grammar`: what each continuation keeps to, and `bad_words` what none has.
    `reader` makes for each prompt what takes in its own rows. `prompts_param`: the request's field
    that they came in. `only_encodes`: nothing is computed, so that a prompt may be too long, or
    empty.
    """

    model: str | None
    sampling: tuple[SamplingParams, ...]
    conversation: Conversation | None = None
    prompts: tuple[str | TokenIds, ...] = ()
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"
    stop_token_ids: frozenset[int] = frozenset()
    ignores_eos: bool = False
    truncates_to: int | None = None
    adds_special_tokens: bool | None = None
    shows_special_tokens: bool = False
    includes_stop: bool = False
    cache_salt: str | None = None
    session: str | None = None
    grammar: Grammar | None = None
    bad_words: tuple[str, ...] = ()
    reader: Callable[[TokenIds], PromptReader] | None = None
    prompts_param: str = "prompt"
    only_encodes: bool = False
