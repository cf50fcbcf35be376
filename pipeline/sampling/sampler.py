"""One request's choices, one token after another."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError, RequestFailed
from pipeline.sampling.choosers import Chooser, Distribution, new_chooser
from pipeline.sampling.draw import NO_NUMBERS, Draw, Text, adjust, is_sound
from pipeline.sampling.filters import Logits, LogitsProcessor, log_softmax, most_likely
from pipeline.sampling.masks import Allowed, Mask, PackedMask
from pipeline.sampling.params import SamplingParams

_NONE_LEFT = "processors and masks leave no token that can be chosen"


class Choice(NamedTuple):
    """A chosen token; `top` holds (token id, logprob), the likeliest first."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses a request's tokens, or says how the last stage has to, and remembers them.

    Owns its random numbers, one per drawn token, so that the same seed gives the same tokens
    whoever shares the batch, and wherever they are drawn. The order is that of `draw`, with the
    user's processors between bias and masks, and the chooser at the end.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        processors: Sequence[LogitsProcessor] = (),
        masks: Sequence[Mask] = (),
        chooser: Chooser | None = None,
        vocab_size: int = 0,
        *,
        is_foreseeable: bool = True,
    ) -> None:
        """`chooser`: in the place of the one that `params` name; `vocab_size`: for `next_draw`.

        `is_foreseeable`: whether all masks are functions of how many tokens there are.
        """
        self._params = params
        self._processors = tuple(processors)
        self._masks = tuple(masks)
        self._packed = (
            masks[0].packed if len(masks) == 1 and isinstance(masks[0], PackedMask) else None
        )
        self._token_ids = list(prompt_ids)
        self._generated: list[int] = []
        self._num_prompt = len(prompt_ids)
        self._vocab_size = vocab_size
        self._is_foreseeable = is_foreseeable
        self._text = Text(prompt_ids)
        self._chooser = chooser or new_chooser(params)
        # What a mask has raised, instead of saying what the next token may be.
        self._failure: Exception | None = None

    def next_draw(self, ahead: int = 0) -> Draw:
        """How the last stage has to draw the next token: the same until one has been `took`.

        Or how one behind it, `ahead` of them further. What stands for those between in its text is
        not theirs, and unless masks are foreseeable what stands for its mask is none.
        """
        how = self._how((self._chooser.uniform(ahead),), ahead)
        if ahead and not self._is_foreseeable:
            return replace(how, allowed=bytes(-(-self._vocab_size // 8)))
        return self._masked(how, [*self._generated, *[0] * ahead] if ahead else self._generated)

    def draw_behind(self, num_before: int, token_id: int) -> Draw:
        """How the token behind `token_id` is drawn, whether or not that has been taken by now.

        `num_before`: tokens generated before it.
        """
        if len(self._generated) > num_before:
            return self.next_draw()
        how = self._how((self._chooser.uniform(1),), 1)
        if how.text.size:
            how = replace(how, text=np.append(how.text[:-1], np.uint32(token_id)))
        return self._masked(how, [*self._generated, token_id])

    def _masked(self, how: Draw, generated: Sequence[int]) -> Draw:
        try:
            allowed = self._bits(generated)
        except Exception as error:  # a mask may be anyone's code; others' tokens are in this step
            self._failure = error
            allowed = bytes(-(-self._vocab_size // 8))  # so this request gets none
        return how if allowed is None else replace(how, allowed=allowed)

    def no_choice(self) -> Exception:
        """Why the last stage has drawn no token: what a mask has raised, if one has."""
        if self._failure is not None:
            return self._failure
        allowed = self._allowed(self._vocab_size, self._generated)
        if allowed is None or allowed.any():
            return RequestFailed(f"{NO_NUMBERS}, or bias and mask leave none")
        return InputError(_NONE_LEFT)

    def took(self, token_id: int) -> None:
        """The next token is this one, drawn by the last stage."""
        self._chooser.spend()
        self._add(token_id)

    def choose(self, logits: npt.NDArray[np.float32]) -> Choice:
        """The next token, from the logits `[vocab]` the model gave it.

        Raises RequestFailed if the logits are not numbers, InputError if the request's own
        processors and masks leave no token to choose, or its chooser takes one that is not left.
        """
        if not is_sound(logits):
            raise RequestFailed(NO_NUMBERS)
        changed = self._change(logits)
        if not is_sound(changed):
            raise InputError(_NONE_LEFT)
        token_id = self._pick(changed)
        self._add(token_id)
        if self._params.logprobs is None:
            return Choice(token_id, None, ())
        logprobs = log_softmax(logits)
        top = most_likely(logits, self._params.logprobs)
        return Choice(
            token_id,
            float(logprobs[token_id]),
            tuple((int(i), float(logprobs[i])) for i in top),
        )

    def _how(self, uniforms: tuple[float, ...], ahead: int = 0) -> Draw:
        if not self._params.has_penalties:
            return Draw(self._params, uniforms)
        ids = self._text.ids
        text = np.concatenate([ids, np.zeros(ahead, ids.dtype)]) if ahead else ids
        return Draw(self._params, uniforms, text, self._num_prompt)

    def _add(self, token_id: int) -> None:
        self._token_ids.append(token_id)
        self._generated.append(token_id)
        self._text.add(token_id)

    def _change(self, logits: Logits) -> Logits:
        logits = adjust(logits, self._how((0.0,)))
        for processor in self._processors:
            logits = processor(self._token_ids, logits)
        allowed = self._allowed(logits.size, self._generated)
        return logits if allowed is None else np.where(allowed, logits, np.float32(-np.inf))

    def _bits(self, generated: Sequence[int]) -> bytes | None:
        """As `_allowed`, a bit a token."""
        if self._packed is not None:
            return self._packed(generated, self._vocab_size)
        allowed = self._allowed(self._vocab_size, generated)
        return None if allowed is None else np.packbits(allowed, bitorder="little").tobytes()

    def _allowed(self, vocab_size: int, generated: Sequence[int]) -> Allowed | None:
        """What all masks allow behind these, [vocab]; None: anything."""
        allowed: Allowed | None = None
        for mask in self._masks:
            more = mask.allowed(generated, vocab_size)
            if more is not None:
                if more.shape != (vocab_size,):
                    raise ValueError("a mask is not of the vocabulary's size")
                allowed = more if allowed is None else allowed & more
        return allowed

    def _pick(self, logits: Logits) -> int:
        distribution = Distribution(logits, self._params)
        token_id = self._chooser.choose(distribution)
        if not distribution.holds(token_id):
            raise InputError(f"the chooser took token {token_id}, which is not left to choose from")
        return token_id
