"""What a text took: its tokens' entropy, the bits they carry, time and tries. No content."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.sampling.choosers import Distribution
from pipeline.stego.token_weights import TokenWeights


class StepRecord(NamedTuple):
    """One token's share, in bits."""

    entropy: float
    carried: float
    # Of the distribution drawn from to the model's: whole numbers stand for its probabilities.
    divergence: float

    @classmethod
    def of(cls, final: Distribution, weights: TokenWeights, carried: float) -> "StepRecord":
        """What a choice among these weights, for that distribution, was worth."""
        # No product of BLAS: its threads take longer to come together than this takes.
        drawn = weights.weights.astype(np.float64)
        own = np.log2(drawn)
        drawn /= weights.total
        entropy = float(np.log2(weights.total) - (drawn * own).sum())
        logits = final.logits[weights.ids].astype(np.float64)
        logits -= logits.max()
        exponents = np.exp(logits)
        logits -= np.log(exponents.sum())
        cross = -float((drawn * logits).sum() / np.log(2))
        return cls(entropy, carried, cross - entropy)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one text; `seconds` from the first try to the verified text, `num_retries` in between."""

    steps: Sequence[StepRecord]
    num_message_bytes: int
    num_bits: int
    seconds: float
    num_retries: int = 0

    @property
    def entropy(self) -> float:
        """Of all tokens, in bits."""
        return sum(step.entropy for step in self.steps)

    @property
    def used(self) -> float:
        """The share of all entropy that carries header and message."""
        return self.num_bits / self.entropy if self.entropy else 0.0

    def summary(self) -> str:
        """One line for people."""
        num_tokens = len(self.steps)
        divergence = sum(step.divergence for step in self.steps) / num_tokens
        return (
            f"{num_tokens} tokens, {num_tokens / self.num_message_bytes:.1f} a byte of message; "
            f"{self.num_bits / num_tokens:.2f} bits a token of {self.entropy / num_tokens:.2f}, "
            f"{self.used:.1%} of the entropy; KL {max(divergence, 0):.1e} bits a token; "
            f"{self.seconds:.2f} s, {self.num_retries} retries"
        )

    def to_json(self) -> dict[str, object]:
        """For who wants to see each token's share."""
        return {
            "message_bytes": self.num_message_bytes,
            "bits": self.num_bits,
            "seconds": self.seconds,
            "retries": self.num_retries,
            "tokens": [step._asdict() for step in self.steps],
        }
