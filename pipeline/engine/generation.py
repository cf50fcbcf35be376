"""What whoever serves requests asks of the engine, and what it gives back."""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio

from pipeline.engine.request import FinishReason
from pipeline.protocol.asked import MAX_BIASES
from pipeline.protocol.wants import MAX_TOP, Result, Want
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.processors import LogitsProcessor


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
    def want(self) -> Want:
        """What the last stage has to return for a token: logits only where nothing less will do."""
        sampling = self.sampling
        num_top = sampling.logprobs or 0
        if self.processors or num_top > MAX_TOP or len(sampling.logit_bias) > MAX_BIASES:
            return Want.LOGITS
        if not sampling.needs_logits:
            return Want.TOKEN
        return Want.DRAWN if sampling.logprobs is None else Want(Result.DRAWN, 1, num_top, 1)


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
        whose `finish` is set; receiving from it raises SessionError if the pipeline fails, and
        RequestFailed if this request alone does.
        """
        ...
