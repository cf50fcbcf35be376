"""How prompts are cut, so that every stage has work and none waits for another's."""

from collections.abc import Sequence
from operator import attrgetter

from pipeline.engine.request import RequestState

# A chunk smaller than this takes nearly as long: a stage reads all its weights for each.
MIN_CHUNK_TOKENS = 64


def cut_prompts(
    left: Sequence[RequestState], num_idle: int, chunk_tokens: int
) -> list[tuple[RequestState, int]]:
    """Chunks of prompts, `chunk_tokens` at most: `num_idle` stages' share of all that is left.

    The shortest go first, for they are soon done; but half is for the oldest, which would else
    wait for as long as shorter ones keep coming.
    """
    if not left:
        return []
    share = -(-sum(state.num_prompt_left for state in left) // num_idle)
    budget = min(max(share, MIN_CHUNK_TOKENS), chunk_tokens)
    oldest = left[0]
    chunks = {oldest.slot: min(oldest.num_prompt_left, -(-budget // 2))}
    budget -= chunks[oldest.slot]
    for state in sorted(left, key=attrgetter("num_prompt_left")):
        has = chunks.get(state.slot, 0)
        more = min(state.num_prompt_left - has, budget)
        budget -= more
        if has + more:
            chunks[state.slot] = has + more
    return [(state, chunks[state.slot]) for state in left if state.slot in chunks]
