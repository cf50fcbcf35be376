"""What a step's result means for one request: its next token, chosen here or on the last stage."""

from pipeline.errors import RequestFailed
from pipeline.protocol.result_kinds import NO_TOKEN
from pipeline.protocol.step_results import SegmentResult
from pipeline.sampling.draw import NO_NUMBERS
from pipeline.sampling.sampler import Choice, Sampler


def choice_of(part: SegmentResult, sampler: Sampler | None) -> Choice:
    """The next token of a request, from its part of a result.

    Chosen here from logits, else the last stage's word. Raises RequestFailed where that has none to
    give, and whatever a processor raises.
    """
    if sampler is not None and part.logits is not None:
        return sampler.choose(part.logits[-1])
    (token_id,) = part.token_ids
    if token_id == NO_TOKEN:
        raise RequestFailed(NO_NUMBERS) if sampler is None else sampler.no_choice()
    if sampler is not None:
        sampler.took(token_id)
    if not part.logprobs.size:
        return Choice(token_id, None, ())
    logprob, *rest = part.logprobs[0].tolist()
    top = zip(part.top_ids[0].tolist(), rest, strict=True)
    return Choice(token_id, logprob, tuple(each for each in top if each[0] != NO_TOKEN))
