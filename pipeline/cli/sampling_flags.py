"""The flags that say how tokens are chosen. What they may be is for `SamplingParams` to say."""

from typing import Annotated

import typer

from pipeline.sampling.choosers import parse_chooser
from pipeline.sampling.params import SamplingParams


def sampling_flags(
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the most likely token, up to 2 draws.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Draw from the likeliest that have P together.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Draw from the K likeliest tokens [0: all].")
    ] = 0,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="Leave out what is P times less likely than the top.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: against tokens of prompt and text.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 0: against tokens of the text, once.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 0: against them each time they came.")
    ] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same seed, the same text [random].")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this; may be repeated.")
    ] = None,
    chooser: Annotated[
        str | None,
        typer.Option(metavar="NAME[:K=V,...]", help="Who draws: draw, greedy, mirostat:tau=5."),
    ] = None,
) -> SamplingParams:
    """What the command line says. Raises InputError."""
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        chooser=None if chooser is None else parse_chooser(chooser),
    )
