"""One request's state: which tokens an engine must take, one for each step's logits."""

from typing import Protocol

from pipeline.stego.adapters.conditional import Conditioning, EngineLogits, conditional, force
from pipeline.stego.cover import CoverProgress
from pipeline.stego.errors import StegoError
from pipeline.stego.token_weights import TokenWeights


class TokenSource(Protocol):
    """Says each next token of a text, and when it is complete."""

    @property
    def is_done(self) -> bool:
        """Whether the text needs no more tokens."""
        ...

    @property
    def progress(self) -> CoverProgress:
        """How many bits the tokens so far carry."""
        ...

    def choose(self, weights: TokenWeights) -> int:
        """The next token's index in its weights. Raises StegoError where there is none."""
        ...


class StegoRequest:
    """The tokens of one text, forced on an engine one by one.

    What goes wrong is kept for `result`, and the text ended: an engine in whose callback an error
    is raised gives up its other requests as well.
    """

    def __init__(self, source: TokenSource, how: Conditioning, end_token_id: int) -> None:
        self._source = source
        self._how = how
        self._end_token_id = end_token_id
        self._token_ids: list[int] = []
        self._error: StegoError | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens have been chosen."""
        return len(self._token_ids)

    @property
    def is_over(self) -> bool:
        """Whether nothing but the token that ends a text is left to force."""
        return self._error is not None or self._source.is_done

    def step(self, logits: EngineLogits, num_taken: int, last: int | None = None) -> None:
        """Choose from a step's logits, [vocab], and force the token on them in place.

        `num_taken` tokens the engine has taken since the prompt, `last` the last, if it tells.
        Where the model lacks the token that ends a text, logits are left as they are.
        """
        if not 0 <= self._end_token_id < len(logits):
            self.fail(StegoError(f"the model has no token {self._end_token_id} to end a text with"))
            return
        force(logits, self._next(logits, num_taken, last))

    def fail(self, error: StegoError) -> None:
        """End the text with an error; the first counts."""
        self._error = self._error or error

    def result(self) -> tuple[int, ...]:
        """The text's tokens. Raises StegoError for what went wrong, or if tokens are missing."""
        if self._error is not None:
            raise self._error
        if not self._source.is_done:
            num_bits = round(self._source.progress.carried)
            raise StegoError(
                f"the engine stopped after {self.num_tokens} tokens, which carry {num_bits} bits: "
                "too few; let it generate more, or give a prompt that leaves more open"
            )
        return tuple(self._token_ids)

    def _next(self, logits: EngineLogits, num_taken: int, last: int | None) -> int:
        if self.is_over:
            return self._end_token_id
        try:
            self._check_taken(num_taken, last)
            weights = conditional(logits, self._how)
            token_id = int(weights.ids[self._source.choose(weights)])
        except StegoError as error:
            self.fail(error)
            return self._end_token_id
        self._token_ids.append(token_id)
        return token_id

    def _check_taken(self, num_taken: int, last: int | None) -> None:
        """An engine that drafts, goes back, or lags behind has not taken what was chosen."""
        is_other = bool(self._token_ids) and last not in {None, self._token_ids[-1]}
        if num_taken != self.num_tokens or is_other:
            raise StegoError(
                f"the engine has taken {num_taken} tokens where {self.num_tokens} were chosen, or "
                "others; switch off speculation, beams and chunks of prompts"
            )
