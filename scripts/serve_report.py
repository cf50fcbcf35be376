"""The figures of a load test: as tables, and as a picture."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.engine.latency import percentile


@dataclass(slots=True)
class Result:
    """One request; times in seconds, `started` since the beginning of the run."""

    started: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float | None = None
    inter_token: list[float] = field(default_factory=list)
    total: float = 0.0
    error: str | None = None


def summarize(results: list[Result]) -> dict:
    """All figures of a run; milliseconds and tokens a second. Failed requests count as errors only."""
    done = [each for each in results if each.error is None]
    samples = {
        "ttft_ms": [each.ttft * 1e3 for each in done if each.ttft is not None],
        "inter_token_ms": [gap * 1e3 for each in done for gap in each.inter_token],
        "request_ms": [each.total * 1e3 for each in done],
    }
    seconds = max((each.started + each.total for each in results), default=0.0)
    output_tokens = sum(each.output_tokens for each in done)
    return {
        "requests": len(results),
        "failed": len(results) - len(done),
        "errors": dict(Counter(each.error for each in results if each.error is not None)),
        "seconds": seconds,
        "prompt_tokens": sum(each.prompt_tokens for each in done),
        "output_tokens": output_tokens,
        "tokens_per_second": output_tokens / seconds if seconds else 0.0,
        "requests_per_second": len(done) / seconds if seconds else 0.0,
        **{name: _spread(values) for name, values in samples.items()},
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    spread = {f"p{percent}": percentile(values, percent / 100) for percent in (50, 95, 99)}
    return {"mean": sum(values) / len(values), **spread, "max": max(values)}


def show(summary: dict, title: str) -> None:
    """The figures as tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    table = Table(title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("mean", "p50", "p95", "p99", "max")
    table.add_column("ms")
    for name in columns:
        table.add_column(name, justify="right")
    rows = {
        "ttft_ms": "first token",
        "inter_token_ms": "between tokens",
        "request_ms": "whole request",
    }
    for key, name in rows.items():
        spread = summary[key]
        table.add_row(name, *("-" if spread is None else f"{spread[each]:.1f}" for each in columns))
    console.print(table)
    console.print(
        f"{summary['tokens_per_second']:.1f} tokens/s, {summary['requests_per_second']:.2f} requests/s; "
        f"{summary['requests'] - summary['failed']} of {summary['requests']} requests in "
        f"{summary['seconds']:.1f} s, {summary['prompt_tokens']} prompt and "
        f"{summary['output_tokens']} generated tokens"
    )
    for error, count in summary["errors"].items():
        console.print(f"failed {count} x {escape(error)}", style="red")


def plot(results: list[Result], summary: dict, path: Path, title: str) -> None:
    """Distributions of both latencies, and tokens a second over time, as a picture."""
    import matplotlib  # noqa: PLC0415  (optional)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    done = [each for each in results if each.error is None and each.ttft is not None]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    latencies = (
        ("first token", [each.ttft * 1e3 for each in done], summary["ttft_ms"]),
        (
            "between tokens",
            [gap * 1e3 for each in done for gap in each.inter_token],
            summary["inter_token_ms"],
        ),
    )
    for axis, (name, values, spread) in zip(axes, latencies, strict=False):
        ordered = sorted(values)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axis.step(ordered, shares, where="post")
        axis.set(title=name, xlabel="ms", ylabel="share", ylim=(0, 1.02))
        if spread:
            for each, style in (("p50", ":"), ("p95", "-."), ("p99", "--")):
                label = f"{each} {spread[each]:.1f} ms"
                axis.axvline(spread[each], linestyle=style, linewidth=1, color="grey", label=label)
            axis.legend(loc="lower right", fontsize=8)
    by_second: Counter[int] = Counter()
    for each in done:
        at = each.started + each.ttft
        by_second[int(at)] += 1
        for gap in each.inter_token:
            at += gap
            by_second[int(at)] += 1
    seconds = range(max(by_second, default=0) + 1)
    axes[2].step(list(seconds), [by_second[second] for second in seconds], where="post")
    axes[2].set(title="tokens a second", xlabel="s", ylim=(0, None))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
