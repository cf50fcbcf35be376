"""`pipeline-orch top`: what a running server and its stages are doing, in the terminal."""

import http.client
import ssl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli.logs import printable
from pipeline.cli.worker_options import SLOW_KERNELS
from pipeline.errors import InputError, PipelineError
from pipeline.gateway.auth import load_api_keys
from pipeline.gateway.overview import PipelineView, StageRates, StageView

_PATH = "/pipeline"
_ANSWER_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1 << 20
# Wide enough for every column where there is no terminal to ask.
_PLAIN_WIDTH = 142
# What they take at most.
_FULL_WIDTH = 130
_TEXTUAL = frozenset({"layers", "kernels", "state", "attested"})
_STATE_STYLES = {"ready": "green", "connecting": "yellow", "down": "bold red"}


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server's figures are."""

    url: str
    is_secure: bool
    host: str
    port: int | None
    path: str
    key: str | None

    @classmethod
    def parse(cls, url: str, key_file: Path | None) -> "ServerAddress":
        """Read the flags. Raises InputError."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InputError(f"--url {url}: {error}") from error
        if parts.scheme not in {"http", "https"} or not host or not url.isprintable():
            raise InputError(f"--url {url}: give an address like http://127.0.0.1:8000")
        # Clients of the API are given the address with /v1 at its end.
        path = parts.path.rstrip("/").removesuffix("/v1") + _PATH
        key = min(load_api_keys(key_file)) if key_file is not None else None
        return cls(url, parts.scheme == "https", host, port, path, key)

    def fetch(self) -> PipelineView:
        """Ask once. Raises InputError for a key that is refused, PipelineError for no answer."""
        status, body = self._get()
        if status in {401, 403}:
            hint = "another key" if self.key else "a key"
            raise InputError(f"{self.url} refuses us ({status}): give {hint} with --api-key-file")
        if status != 200:
            raise PipelineError(f"{self.url} answers {status} to {_PATH}: is it a veilpipe server?")
        try:
            return PipelineView.model_validate_json(body)
        except ValidationError as error:
            raise PipelineError(f"{self.url} answers {_PATH} with something else") from error

    def _get(self) -> tuple[int, bytes]:
        # Neither proxies nor redirects: whoever they lead to would get the key.
        kind = http.client.HTTPSConnection if self.is_secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=_ANSWER_SECONDS)
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection.request("GET", self.path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException, ssl.SSLError, ValueError) as error:
            raise PipelineError(
                f"no answer from {self.url} ({_describe(error)}); does `pipeline-orch serve` run?"
            ) from error
        finally:
            connection.close()


def top(source: ServerAddress, interval: float, *, once: bool) -> None:
    """Show the server until interrupted, or once. Raises PipelineError."""
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else _PLAIN_WIDTH, highlight=False)
    first = source.fetch()
    if once:
        console.print(render(first, console.width))
        return
    try:
        if not is_terminal:
            for view, problem in _follow(source, first, interval):
                console.print(render(view, console.width, problem))
            return
        with Live(
            render(first, console.width), console=console, screen=True, auto_refresh=False
        ) as live:
            for view, problem in _follow(source, first, interval):
                live.update(render(view, console.width, problem), refresh=True)
    except KeyboardInterrupt:
        return  # how one leaves it


def _follow(
    source: ServerAddress, first: PipelineView, interval: float
) -> Iterator[tuple[PipelineView, str]]:
    """What is seen as time goes on; the last view with the problem while there is no new one."""
    view, problem = first, ""
    while True:
        yield view, problem
        time.sleep(interval)
        try:
            view, problem = source.fetch(), ""
        except PipelineError as error:
            problem = str(error)


def render(view: PipelineView, width: int, problem: str = "") -> Group:
    """The whole picture."""
    lines = [_summary(view), _latencies(view)]
    if problem:
        lines.append(Text(f"not current: {printable(problem)}", style="bold red"))
    return Group(*lines, *_stage_tables(view, width))


def _summary(view: PipelineView) -> Text:
    engine = view.engine
    state = ("ready", "green") if view.is_ready else ("not ready", "bold red")
    text = Text.assemble((printable(view.model), "bold"), "  ", state)
    text.append(f"  running {engine.num_running}/{engine.max_batch}")
    text.append(f"  waiting {engine.num_waiting}")
    text.append(f"  {view.latency.tokens_per_second:.1f} tokens/s")
    text.append(f"  failovers {engine.num_failovers}")
    if engine.recovery_seconds:
        text.append(f" (last took {engine.recovery_seconds:.2f} s)")
    return text


def _latencies(view: PipelineView) -> Text:
    latency = view.latency

    def pair(p50: float | None, p95: float | None) -> str:
        return "-" if p50 is None or p95 is None else f"p50 {p50 * 1e3:.1f} p95 {p95 * 1e3:.1f} ms"

    ttft = pair(latency.ttft_p50_seconds, latency.ttft_p95_seconds)
    inter_token = pair(latency.inter_token_p50_seconds, latency.inter_token_p95_seconds)
    return Text(f"first token {ttft}   between tokens {inter_token}")


def _stage_tables(view: PipelineView, width: int) -> list[Table]:
    """One row a stage; two tables, one below the other, where one does not fit."""
    rows = [_stage_cells(stage, view.engine.max_seq_len) for stage in view.stages]
    names = tuple(rows[0]) if rows else ()
    parts = [names] if width >= _FULL_WIDTH else [names[:7], (names[0], *names[7:])]
    return [_table(part, rows) for part in parts]


def _table(names: Sequence[str], rows: Sequence[Mapping[str, Text]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        justify: Literal["left", "right"] = "left" if name in _TEXTUAL else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _stage_cells(stage: StageView, max_seq_len: int) -> dict[str, Text]:
    figures, rates, age = stage.figures, stage.rates, stage.handshake_age_seconds
    batch = kv_used = "-"
    if figures is not None:
        batch = str(figures.last_batch)
        room = figures.num_slots * max_seq_len
        kv_used = f"{figures.kv_tokens} tok" + (f" {figures.kv_tokens / room:.0%}" if room else "")
    return {
        "stage": Text(str(stage.stage_idx)),
        "layers": Text(
            f"{stage.layer_start}-{stage.layer_end - 1} {printable(stage.precision)[:8]}"
        ),
        "kernels": _kernels(stage.kernels),
        "state": Text(stage.state, style=_STATE_STYLES[stage.state]),
        "load": Text("-" if rates is None else f"{rates.load:.0%}"),
        "batch": Text(batch),
        "KV used": Text(kv_used),
        "bytes/s": Text("-" if rates is None else _bytes(rates.bytes_per_second)),
        **_step_cells(rates),
        "attested": _attested(stage),
        "handshake": Text("-" if age is None else _age(age)),
    }


def _step_cells(rates: StageRates | None) -> dict[str, Text]:
    if rates is None or rates.compute_ms is None:
        return dict.fromkeys(("ms/step", "compute", "crypto", "wire"), Text("-"))
    parts = {
        "compute": rates.compute_ms,
        "crypto": rates.crypto_ms or 0.0,
        "wire": rates.wire_ms or 0.0,
    }
    shown = {name: Text(f"{ms:.2f}", style="dim") for name, ms in parts.items()}
    return {"ms/step": Text(f"{sum(parts.values()):.2f}"), **shown}


def _kernels(name: str | None) -> Text:
    """Those that are several times slower than others stand out."""
    style = "yellow" if name == SLOW_KERNELS else ""
    return Text("-" if name is None else printable(name)[:7], style=style)


def _attested(stage: StageView) -> Text:
    if stage.evidence == "nitro" and stage.measurement:
        return Text(f"nitro {printable(stage.measurement)[:12]}", style="green")
    if stage.evidence == "key_only":
        return Text("key", style="yellow")
    return Text("-" if stage.evidence is None else printable(stage.evidence)[:16], style="yellow")


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _age(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__
