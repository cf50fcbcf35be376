"""What is told of a prompt's own tokens: as OpenAI echoes them, and as vLLM lists them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.engine.generation import Generation, TokenOutput
from pipeline.engine.output_text import StoppedText
from pipeline.engine.prompt_reader import PromptScores
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.continuations import PlacedToken

# JSON has no infinities; OpenAI writes an impossible token's logprob so.
IMPOSSIBLE = -9999.0


@dataclass(frozen=True, slots=True)
class Echo:
    """What stands before a choice's text: the prompt's, and its tokens where they are asked for."""

    text: str = ""
    prompt_ids: Sequence[int] = ()
    scores: PromptScores | None = None

    @classmethod
    def of(cls, generation: Generation, text: str, *, has_logprobs: bool) -> "Echo":
        """A generation's prompt; with logprobs if it is read."""
        if not has_logprobs:
            return cls(text)
        return cls(text, generation.prompt_ids, _scores(generation))

    def tokens(self, tokenizer: GatewayTokenizer, num_top: int) -> Iterator[PlacedToken]:
        """The prompt's, once they have been read; nothing stands before the first."""
        if self.scores is None:
            return
        text = StoppedText(tokenizer, (), ())
        for index, token_id in enumerate(self.prompt_ids):
            output = TokenOutput(token_id, None, (), None)
            if index:
                output = TokenOutput(*self.scores.at(index, num_top), None)
            yield PlacedToken(text.num_decoded, output)
            text.push(token_id)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """vLLM's field: for each token of the prompt the tokens that might stand there, by id.

    A token's rank is null where it is none of the likeliest that were asked for.
    """

    prompt_ids: Sequence[int]
    scores: PromptScores
    num_top: int

    @classmethod
    def of(cls, generation: Generation, num_top: int) -> "PromptLogprobs":
        """Those of a generation that reads its prompt."""
        return cls(generation.prompt_ids, _scores(generation), num_top)

    def entries(self, tokenizer: GatewayTokenizer) -> Iterator[Mapping[int, Any] | None]:
        """One a token, once they have been read; none for the first, which follows nothing."""
        for index in range(len(self.prompt_ids)):
            if index == 0:
                yield None
                continue
            token_id, logprob, top = self.scores.at(index, self.num_top)
            found: dict[int, tuple[float, int | None]] = {token_id: (logprob, None)}
            found |= {each: (value, rank) for rank, (each, value) in enumerate(top, 1)}
            yield {
                each: {
                    "logprob": finite(value),
                    "rank": rank,
                    "decoded_token": tokenizer.token_bytes(each).decode(errors="replace"),
                }
                for each, (value, rank) in found.items()
            }


def _scores(generation: Generation) -> PromptScores:
    assert isinstance(generation.reader, PromptScores)  # whoever asks for them has it read
    return generation.reader


def finite(logprob: float | None) -> float:
    """As JSON can have it."""
    return logprob if logprob is not None and math.isfinite(logprob) else IMPOSSIBLE
