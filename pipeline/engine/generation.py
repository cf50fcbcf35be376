"""What whoever serves requests asks of the engine, and what it gives back."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio

from pipeline.engine.request import FinishReason
from pipeline.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation to generate: of which prompt, how long, ended by what, chosen how."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    eos_token_ids: frozenset[int]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token; `finish` is set on the last.

    `logprob` and `top` (token id, logprob; most likely first) are filled in if the sampling asked.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish: FinishReason | None


class Engine(Protocol):
    """A running pipeline, shared by every request."""

    @property
    def max_seq_len(self) -> int:
        """Tokens a request may occupy, its prompt included."""
        ...

    def generate(
        self, generation: Generation
    ) -> AbstractAsyncContextManager[trio.abc.ReceiveChannel[TokenOutput]]:
        """Generate while the context is open; leaving it, for whatever reason, aborts the rest.

        Entering raises PromptError if the prompt can never fit. The channel ends after the output
        whose `finish` is set; receiving from it raises SessionError if the pipeline fails.
        """
        ...
