"""The `leakage` command: measure a mode, and show what the package's cards say."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.progress import progress_bars
from pipeline.errors import InputError
from pipeline.files import check_writable
from pipeline.kernels.runtime import set_num_threads

if TYPE_CHECKING:
    from pipeline.leakage.cards import Card


def leakage_command(
    mode: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="A mode, such as client, rotate, scx or offload."),
    ] = None,
    model_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The model everybody has, and its tokenizer.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="F.png", help="Draw recovery by attack and layer.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print the package's own cards as a Markdown table.")
    ] = False,
    texts: Annotated[int, typer.Option(min=1, metavar="N", help="Texts that are attacked.")] = 20,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of each.")] = 64,
    layers: Annotated[
        str | None, typer.Option(metavar="L,...", help="Layers [0, 1, the middle, the last].")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads to compute with [all CPUs].")
    ] = None,
) -> None:
    """Measure what a mode's server can recover, by attacking it on this machine.

    Recovery is a share of tokens: 1 means that the server reads everything. It takes minutes;
    --texts, --tokens and --layers shorten it. What every mode is used by is the package's own
    card, measured on SmolLM2: --table prints those.

    \b
        pipeline-orch leakage --mode rotate --model-dir models/smollm2
    """
    from pipeline.leakage.cards import markdown_table

    if table:
        print(markdown_table(), end="")
        return
    if plot is not None:
        check_writable(plot)
        _check_can_plot()
    set_num_threads(threads or len(os.sched_getaffinity(0)))
    card = _measure(mode, model_dir, texts, tokens, _parse_layers(layers))
    if plot is not None:
        _draw(card, plot)
    if as_json:
        print(card.model_dump_json(indent=2))
    else:
        _show(card)


def _measure(
    mode: str | None,
    model_dir: Path | None,
    texts: int,
    tokens: int,
    layers: tuple[int, ...] | None,
) -> "Card":
    from pipeline.leakage.measure import Laboratory
    from pipeline.leakage.modes import find_mode
    from pipeline.leakage.suite import Scope

    given = {"--mode": mode, "--model-dir": model_dir}
    if mode is None or model_dir is None:
        missing = [name for name, value in given.items() if value is None]
        raise InputError(f"missing {', '.join(missing)}; see pipeline-orch leakage --help")
    found = find_mode(mode)
    scope = Scope(num_texts=texts, num_tokens=tokens, layers=layers)
    with progress_bars() as watch:
        return Laboratory.open(model_dir, scope, watch).card(found, watch)


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(sorted({int(each) for each in text.split(",")}))
    except ValueError as error:
        raise InputError(f"--layers {text[:80]!r}: give numbers, as in 0,1,15") from error


def _show(card: "Card") -> None:
    """The card as a terminal, or a file, shows it."""
    from rich.console import Console
    from rich.table import Table

    # what goes into a file is not cut to a terminal's width
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    table = Table("layer", "attack", "attacker has", "candidates", "tokens", "recovered")
    for each in card.recoveries:
        table.add_row(
            str(each.layer),
            each.attack,
            each.attacker,
            each.candidates,
            str(each.tokens),
            f"{each.token_recovery:.1%}",
        )
    console.print(table)
    if card.epsilon is not None:
        console.print(f"{card.setting}: epsilon {card.epsilon:.3g} for a text of that length")
    for setting in card.settings:
        console.print(
            f"sigma {setting.sigma:g} (epsilon {setting.epsilon:.3g}): "
            f"{setting.token_recovery:.1%} of tokens recovered at layer 0 by {setting.attack}, "
            f"KL {setting.kl:.3g}, same greedy token {setting.greedy_agreement:.1%}"
        )
    utility, cost = card.utility, card.cost
    console.print(
        f"max |Δlogit| {utility.max_logit_difference:.3g}, KL {utility.kl:.3g}, same greedy token "
        f"{utility.greedy_agreement:.1%}; {cost.tokens_per_second:.1f} tokens/s in one process "
        f"(plain {cost.plain_tokens_per_second:.1f}), {cost.bytes_per_token} bytes and "
        f"{cost.round_trips_per_token} round trip{'' if cost.round_trips_per_token == 1 else 's'} "
        "a token"
    )
    if (view := card.uniformity) is not None:
        console.print(
            f"what is sent, beside uniform bytes: chi-square {view.chi_square:.0f} with "
            f"{view.degrees} degrees of freedom over {view.words} words, p {view.p_value:.2f}"
        )
    console.print(f"A lying server {card.integrity.lying_server}.")
    console.print(f"Found by: {card.integrity.found_by}.")
    console.print(f"{card.mode}{f' ({card.setting})' if card.setting else ''}: {card.protects}")


def _check_can_plot() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'veilpipe[bench]'") from None


def _draw(card: "Card", path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    attacks = list(dict.fromkeys(each.attack for each in card.recoveries))
    layers = sorted({each.layer for each in card.recoveries})
    tried = {
        layer: [each.attack for each in card.recoveries if each.layer == layer] for layer in layers
    }
    width = 0.85 / max(map(len, tried.values()))
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for index, attack in enumerate(attacks):
        own = [each for each in card.recoveries if each.attack == attack]
        # around its layer's place, next to what else was tried there
        places = [
            layers.index(each.layer)
            + width * (tried[each.layer].index(attack) - (len(tried[each.layer]) - 1) / 2)
            for each in own
        ]
        bars = axes.bar(
            places, [each.token_recovery for each in own], width, label=attack, color=f"C{index}"
        )
        # so that an attack that finds nothing is told from one that was not tried
        labels = [f"{100 * each.token_recovery:.0f}" for each in own]
        axes.bar_label(bars, labels, fontsize="x-small", padding=2)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    name = f"{card.mode} ({card.setting})" if card.setting else card.mode
    title = f"{name}: {card.model}, texts: {card.texts}"
    axes.set(xlabel="layer", ylabel="tokens recovered", ylim=(0, 1.1), title=title)
    figure.legend(loc="outside right upper", fontsize="small")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)
