"""What the last stage returns for a segment: which rows, as what, with how many numbers each."""

from enum import IntEnum
from functools import lru_cache
from typing import ClassVar, NamedTuple

from pipeline.errors import MessageError

# Stands for a token where the model's logits are no numbers, or nothing may be chosen.
NO_TOKEN = (1 << 32) - 1
# What the wire has room for.
MAX_TOP = (1 << 8) - 1


class Result(IntEnum):
    """What becomes of a row of the last stage's output."""

    NOTHING = 0
    # The most likely token.
    TOKEN = 1
    LOGITS = 2
    # The row itself: behind the last layer, before the final norm.
    HIDDEN = 3
    # The log-probabilities of given ids, and the most likely ids with theirs.
    LOGPROBS = 4
    # A token drawn as the step says, and if asked for its log-probability and the most likely ids.
    DRAWN = 5


class _Want(NamedTuple):
    result: Result
    # So many of the segment's last rows.
    rows: int = 1
    # Most likely ids of each row to name.
    top: int = 0
    # Ids of each row to score: given ones, or 1 for the drawn one.
    num_ids: int = 0


class Want(_Want):
    """What the last stage returns for a segment. A tuple: one is looked at for every token."""

    __slots__ = ()
    NOTHING: ClassVar["Want"]
    TOKEN: ClassVar["Want"]
    LOGITS: ClassVar["Want"]
    HIDDEN: ClassVar["Want"]
    DRAWN: ClassVar["Want"]

    def __bool__(self) -> bool:
        """Whether anything is to come back."""
        return self.result is not Result.NOTHING

    @property
    def num_tokens(self) -> int:
        """Tokens that come back."""
        return self.rows if self.result in _WITH_TOKENS else 0

    @property
    def num_logprobs(self) -> int:
        """Log-probabilities that come back."""
        return self.rows * (self.num_ids + self.top)

    @property
    def num_given(self) -> int:
        """Ids to score that go with the step."""
        return self.rows * self.num_ids if self.result is Result.LOGPROBS else 0


Want.NOTHING = Want(Result.NOTHING, 0)
Want.TOKEN = Want(Result.TOKEN)
Want.LOGITS = Want(Result.LOGITS)
Want.HIDDEN = Want(Result.HIDDEN)
Want.DRAWN = Want(Result.DRAWN)
_WITH_TOKENS = frozenset({Result.TOKEN, Result.DRAWN})
# Members of an enumeration are slow to look up by calling it.
_RESULTS = {int(result): result for result in Result}


@lru_cache(maxsize=256)  # a pipeline repeats a few for every token
def want_from_wire(result: int, rows: int, top: int, num_ids: int) -> Want:
    """A want that a peer has named; each has one form. Raises MessageError for any other."""
    want = Want(_RESULTS.get(result, Result.NOTHING), rows, top, num_ids)
    match want.result:
        case Result.NOTHING:
            is_valid = want == Want.NOTHING and result == Result.NOTHING
        case Result.LOGPROBS:
            is_valid = top + num_ids > 0
        case Result.DRAWN:
            is_valid = num_ids <= 1 and (num_ids == 1 or not top)
        case _:
            is_valid = not (top or num_ids)
    if not is_valid or (rows == 0 and want != Want.NOTHING):
        raise MessageError(
            f"step header holds an unknown want: {result} of {rows} rows, top {top}, {num_ids} ids"
        )
    return want
