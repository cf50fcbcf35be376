"""What whoever serves requests asks of the engine, and what it gives back."""

from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from pipeline.engine.home_times import Times
from pipeline.engine.prompt_reader import PromptReader
from pipeline.engine.request import FinishReason
from pipeline.engine.stored_text import StoredText
from pipeline.errors import InputError
from pipeline.protocol.result_kinds import MAX_TOP, Result, Want
from pipeline.protocol.step_header import StageTiming
from pipeline.sampling.choosers import ChooserFactory, in_parameters
from pipeline.sampling.filters import LogitsProcessor
from pipeline.sampling.masks import Mask, masks_of
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.sampler import Sampler
from transport.frozen import frozen


@frozen
class Generation:
    """One continuation to generate: of which prompt, how long, ended by what, chosen how.

    `processors` are anyone's own code, applied to the logits in this order on the user's side, and
    so are `masks` and what `chooser` makes for this request, in the place of `sampling`'s.
    `request_id` is the caller's name for it in logs. `salt`: whose text it is; it goes on from what
    requests of the same salt have left on the stages, and leaves its own to them; None: neither.
    `stored`: the session that its text goes on from, and becomes. `vocab_size`: token ids the model
    has, so that the last stage can be told which are allowed; 0 if that is not known.
    `samples_at_home`: all logits come back for every token, and no stage chooses. `reader` takes in
    what the prompt's own rows tell, before the first token comes; with one `max_tokens` may be 0.
    `client`: who asks, by whom what there is is shared. Raises InputError if what `sampling` wants
    cannot be had of so few tokens.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    eos_token_ids: frozenset[int]
    sampling: SamplingParams
    processors: tuple[LogitsProcessor, ...] = ()
    masks: tuple[Mask, ...] = ()
    chooser: ChooserFactory | None = None
    request_id: str = ""
    vocab_size: int = 0
    salt: bytes | None = None
    stored: StoredText | None = None
    samples_at_home: bool = False
    reader: PromptReader | None = None
    client: bytes | None = None

    def __post_init__(self) -> None:
        """Check what the parameters alone cannot."""
        if not (self.max_tokens or self.reader):
            raise InputError("max_tokens is 0, and nothing is asked of the prompt")
        if self.sampling.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.sampling.min_tokens}, more than max_tokens, {self.max_tokens}"
            )

    @property
    def want(self) -> Want:
        """What the last stage has to return for a token: logits only where nothing less will do."""
        sampling = in_parameters(self.sampling)
        num_top = sampling.logprobs or 0
        has_own = self.processors or self.chooser or sampling.chooser
        has_mask = bool(self.masks) or sampling.has_mask
        is_unknown = has_mask and not self.vocab_size
        if self.samples_at_home or has_own or is_unknown or num_top > MAX_TOP:
            return Want.LOGITS
        if not (sampling.needs_logits or has_mask):
            return Want.TOKEN
        return Want.DRAWN if sampling.logprobs is None else Want(Result.DRAWN, 1, num_top, 1)

    def new_sampler(self) -> Sampler | None:
        """Who chooses its tokens; None: the last stage, the most likely one. Raises InputError."""
        if self.want == Want.TOKEN:
            return None
        masks = (*masks_of(self.sampling, self.eos_token_ids), *self.masks)
        chooser = None if self.chooser is None else self.chooser()
        sampling = in_parameters(self.sampling)
        return Sampler(
            sampling,
            self.prompt_ids,
            self.processors,
            masks,
            chooser,
            self.vocab_size,
            is_foreseeable=not self.masks,
        )


@frozen
class TokenOutput:
    """One generated token; `finish` is set on the last, which is NO_TOKEN where none was wanted.

    `logprob` and `top` (token id, logprob; most likely first) are filled in if the sampling asked.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finish: FinishReason | None
    # What each stage needed for the step that brought it.
    timings: tuple[StageTiming, ...] = ()
    # And what it cost here, if the ends of the model are held here.
    home_times: Times | None = None
    # Tokens of the prompt that were not computed for this request, since a slot held them.
    num_cached: int = 0


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
