"""What whoever serves requests asks of the engine, and what it gives back."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio

from pipeline.engine.request import FinishReason
from pipeline.protocol.messages import StageTiming
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.processors import LogitsProcessor
from pipeline.sampling.sampler import Sampler


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation to generate: of which prompt, how long, ended by what, chosen how.

    `processors` are anyone's own code, applied to the logits in this order on the user's side;
    `request_id` is the caller's name for it in logs.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    eos_token_ids: frozenset[int]
    sampling: SamplingParams
    processors: tuple[LogitsProcessor, ...] = ()
    request_id: str = ""

    @property
    def needs_logits(self) -> bool:
        """Whether more than the last stage's greedy token is asked for."""
        return self.sampling.needs_logits or bool(self.processors)

    def new_sampler(self) -> Sampler | None:
        """Who chooses its tokens; None: the last stage, the most likely one."""
        if not self.needs_logits:
            return None
        return Sampler(self.sampling, self.prompt_ids, self.processors)


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One generated token; `finish` is set on the last.

    `logprob` and `top` (token id, logprob; most likely first) are filled in if the sampling asked.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish: FinishReason | None
    # What each stage needed for the step that brought it.
    timings: tuple[StageTiming, ...] = ()


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
        whose `finish` is set; receiving from it raises SessionError if the pipeline fails, and
        RequestFailed if this request alone does.
        """
        ...
