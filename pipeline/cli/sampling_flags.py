"""The flags that say how tokens are chosen. What they may be is for `SamplingParams` to say."""

from typing import Annotated, Literal, Self

from pydantic import model_validator

from pipeline.cli.settings import Flag, Settings
from pipeline.sampling.choosers import parse_chooser
from pipeline.sampling.params import SamplingParams

SampleAtFlag = Annotated[
    Literal["stage", "home"],
    Flag("WHERE", "Who draws tokens: the last stage, or home, which has all logits sent."),
]


class SamplingFlags(Settings):
    """How tokens are chosen."""

    temperature: Annotated[float, Flag("T", "0 takes the most likely token, up to 2 draws.")] = 0.0
    top_p: Annotated[float, Flag("P", "Draw from the likeliest that have P together.")] = 1.0
    top_k: Annotated[int, Flag("K", "Draw from the K likeliest tokens [0: all].")] = 0
    min_p: Annotated[float, Flag("P", "Leave out what is P times less likely than the top.")] = 0.0
    repetition_penalty: Annotated[
        float, Flag("X", "Above 1: against tokens of prompt and text.")
    ] = 1.0
    presence_penalty: Annotated[float, Flag("X", "Above 0: against tokens of the text, once.")] = (
        0.0
    )
    frequency_penalty: Annotated[float, Flag("X", "Above 0: against them each time they came.")] = (
        0.0
    )
    seed: Annotated[int | None, Flag("N", "The same seed, the same text [random].")] = None
    stop: Annotated[
        tuple[str, ...], Flag("TEXT", "End before this; may be repeated.", is_by_hand=True)
    ] = ()
    chooser: Annotated[
        str | None, Flag("NAME[:K=V,...]", "Who draws: draw, greedy, mirostat:tau=5.")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.params()
        return self

    def params(self) -> SamplingParams:
        """What they amount to. Raises InputError."""
        chooser = None if self.chooser is None else parse_chooser(self.chooser)
        return SamplingParams(**self.model_dump(exclude={"chooser"}), chooser=chooser)
