"""Medians, ratios and pictures of what a comparison measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contenders.lineup import BYTES_PER_WEIGHT, FLOOR
from contenders.referee import Contender, Outcome
from rich.table import Table

OWN = "veilpipe"
OWN_COLOUR, OTHER_COLOUR = "#2a6f97", "#b0b7bd"


@dataclass(frozen=True)
class Heat:
    """One comparison: contenders with as many threads each, and what came of it."""

    threads: int
    contenders: Sequence[Contender]
    outcome: Outcome

    def rounds(self, contender: Contender, task: str) -> list[float]:
        return self.outcome.figures.get(contender.name, {}).get(task, [])

    def median(self, contender: Contender, task: str) -> float | None:
        rounds = self.rounds(contender, task)
        return statistics.median(rounds) if rounds else None

    def finished(self) -> list[Contender]:
        return [each for each in self.contenders if each.name in self.outcome.figures]

    def rival(self, contender: Contender, engine: str) -> Contender | None:
        """The one-process contender of `engine` with weights of the same kind."""
        for other in self.finished():
            if (other.engine, other.kind, other.processes) == (engine, contender.kind, 1):
                return other
        return None

    def ratio(self, contender: Contender, base: Contender | None, task: str) -> float | None:
        """Median over rounds of the ratio within a round: the machine's mood cancels out."""
        if base is None or base is contender:
            return None
        mine, theirs = self.rounds(contender, task), self.rounds(base, task)
        if not mine or len(mine) != len(theirs):
            return None
        return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))

    def floor_ms(self, contender: Contender) -> float | None:
        """Reading the weights once at the speed the machine was measured to have."""
        rounds = self.outcome.figures.get(FLOOR, {}).get("decode", [])
        if not rounds:
            return None
        share = BYTES_PER_WEIGHT[contender.kind] / BYTES_PER_WEIGHT["float32"]
        return statistics.median(rounds) * share

    def agreement(self, contender: Contender) -> str:
        """How many of its first tokens are those of our one float32 process."""
        ids = self.outcome.token_ids
        reference = next(
            (ids[c.name] for c in self.finished() if (c.engine, c.kind) == (OWN, "float32")), None
        )
        mine = ids.get(contender.name)
        if not reference or not mine:
            return ""
        same = 0
        for a, b in zip(mine, reference, strict=False):
            if a != b:
                break
            same += 1
        return f"{same}/{len(reference)}"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def row(heat: Heat, contender: Contender) -> dict[str, float | str | int | None]:
    decode = heat.median(contender, "decode")
    floor_ms = heat.floor_ms(contender)
    batch_ms = heat.median(contender, "batch")
    return {
        "name": contender.name,
        "kind": contender.kind,
        "processes": contender.processes,
        "threads": contender.threads,
        "decode_ms": decode,
        "over_own_process": heat.ratio(contender, heat.rival(contender, OWN), "decode"),
        "over_llama_cpp": heat.ratio(contender, heat.rival(contender, "llama.cpp"), "decode"),
        "over_llama_cpp_rpc": heat.ratio(contender, rpc_of(heat, contender), "decode"),
        "over_floor": decode / floor_ms if decode and floor_ms else None,
        "prefill_ms": heat.median(contender, "prefill"),
        "batch_tokens_per_s": 1e3 * 16 / batch_ms if batch_ms else None,
        "same_tokens": heat.agreement(contender),
    }


def rpc_of(heat: Heat, contender: Contender) -> Contender | None:
    """llama.cpp's split of the same weights, for those that are split as well."""
    for other in heat.finished():
        if (other.engine, other.kind) == ("llama.cpp rpc", contender.kind):
            return other if contender.processes > 1 else None
    return None


def table(heat: Heat, title: str) -> Table:
    found = Table(title=title, title_justify="left")
    found.add_column("contender")
    for heading in (
        "processes x threads", "ms/token", "/ own process", "/ llama.cpp", "/ its RPC",
        "/ floor", "prefill ms", "batch 16 tokens/s", "same tokens",
    ):  # fmt: skip
        found.add_column(heading, justify="right")
    for contender in heat.finished():
        if contender.name == FLOOR:
            continue
        cells = row(heat, contender)
        found.add_row(
            contender.name,
            f"{contender.processes} x {contender.threads}",
            number(cells["decode_ms"]),
            number(cells["over_own_process"]),
            number(cells["over_llama_cpp"]),
            number(cells["over_llama_cpp_rpc"]),
            number(cells["over_floor"]),
            number(cells["prefill_ms"], 0),
            number(cells["batch_tokens_per_s"], 0),
            str(cells["same_tokens"]),
            style="bold" if contender.engine == OWN else None,
        )
    return found


def draw(heats: Sequence[Heat], title: str, path: Path) -> None:
    """Bars of ms per token by kind of weight, with the floor of each as a line."""
    from matplotlib import pyplot  # noqa: PLC0415 - optional, and slow to import

    pyplot.switch_backend("agg")
    tallest = max(len(heat.finished()) for heat in heats)
    figure, all_axes = pyplot.subplots(
        1, len(heats), figsize=(8 * len(heats), 1.5 + 0.42 * tallest), squeeze=False
    )
    for axes, heat in zip(all_axes[0], heats, strict=True):
        draw_heat(axes, heat)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_heat(axes, heat: Heat) -> None:
    ranks = list(BYTES_PER_WEIGHT)
    shown = [c for c in heat.finished() if heat.median(c, "decode") and c.name != FLOOR]
    shown.sort(key=lambda c: (ranks.index(c.kind), heat.median(c, "decode")))
    for position, contender in enumerate(shown):
        decode = heat.median(contender, "decode")
        colour = OWN_COLOUR if contender.engine == OWN else OTHER_COLOUR
        axes.barh(position, decode, color=colour)
        axes.text(decode, position, f" {decode:.1f}", va="center", fontsize=8)
        if (floor_ms := heat.floor_ms(contender)) is not None:
            axes.plot([floor_ms] * 2, [position - 0.45, position + 0.45], color="black", lw=1.2)
    axes.set_yticks(range(len(shown)), [c.name for c in shown], fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    plural = "" if heat.threads == 1 else "s"
    axes.set_xlabel("ms per token, one sequence (black: reading the weights once)")
    axes.set_title(f"{heat.threads} thread{plural} a process", fontsize=10)
