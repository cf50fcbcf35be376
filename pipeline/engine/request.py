"""A request on its way from prompt to last token."""

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a request ended."""

    EOS = "eos"
    LENGTH = "length"
    CONTEXT = "context"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked: prompt token ids, how many tokens at most, which ids end it."""

    request_id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    # Logits instead of the greedy token, for whoever samples.
    wants_logits: bool = False


@dataclass(slots=True)
class RequestState:
    """A request that owns a KV slot; the scheduler alone changes it."""

    request: Request
    # Set when the request is admitted, and again after a restart.
    slot: int = -1
    # Tokens handed to the pipeline so far, whether or not their step has come back.
    num_sent: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def num_known(self) -> int:
        """Tokens that may be sent: the prompt, and each token that has come back."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    def pending(self, limit: int) -> tuple[int, ...]:
        """The next at most `limit` token ids to send."""
        prompt = self.request.prompt_ids
        if self.num_sent < len(prompt):
            return prompt[self.num_sent : self.num_sent + limit]
        start = self.num_sent - len(prompt)
        return tuple(self.token_ids[start : start + limit])


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token; `finish` is set on a request's last."""

    request_id: int
    token_id: int
    step: int
    finish: FinishReason | None
