"""How prompts are cut, so that every stage has work and none waits for another's."""

from collections.abc import Sequence
from operator import attrgetter

from pipeline.engine.request import RequestState

# A chunk smaller than this takes nearly as long, if nothing better is known: a stage reads all its
# weights for each.
MIN_CHUNK_TOKENS = 64
# While the first chunk is in the first stage all others wait, and so does the first for the last
# one: each such wait is a small part of the whole.
PARTS = 8


def chunk_size(left: Sequence[RequestState], num_stages: int, least: int, most: int) -> int:
    """Tokens of a step of what is left of prompts: from `least`, for less takes as long."""
    num_left = sum(state.num_prompt_left for state in left)
    return min(max(-(-num_left // max(1, PARTS * (num_stages - 1))), least), most)


def cut_prompts(left: Sequence[RequestState], budget: int) -> list[tuple[RequestState, int]]:
    """Chunks of prompts for a step of so many tokens.

    The shortest go first, for they are soon done; but half is for the oldest, which would else
    wait for as long as shorter ones keep coming.
    """
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
