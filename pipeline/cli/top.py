"""`pipeline-orch top`: what a running server and its stages are doing, in the terminal."""

import http.client
import os
import select
import ssl
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli.compute_options import SLOW_KERNELS
from pipeline.cli.logs import printable
from pipeline.errors import InputError, PipelineError
from pipeline.gateway.auth import load_api_keys
from pipeline.gateway.pipeline_status import PipelineView, ReplicaView, StageRates, StageView
from pipeline.gateway.readiness import Phase

_PATH = "/pipeline"
_ANSWER_SECONDS = 5.0
_MAX_ANSWER_BYTES = 1 << 20
# Wide enough for every column where there is no terminal to ask.
_PLAIN_WIDTH = 170
_GAP = 2  # between columns
_TEXTUAL = frozenset({"layers", "kernels", "state", "attested", "address"})
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
        is_text = url.isprintable() and " " not in url
        if parts.scheme not in {"http", "https"} or not host or not is_text:
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
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection = kind(self.host, self.port, timeout=_ANSWER_SECONDS)
        except http.client.InvalidURL as error:
            raise InputError(f"--url {self.url}: {error}") from error
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
    """Show the server until interrupted or told to quit, or once. Raises PipelineError.

    A terminal that can do no more than print (TERM=dumb) gets what a pipe does: one table after
    another.
    """
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    first = source.fetch()
    if once:
        console.print(render(first, console.width))
        return
    try:
        with _Keys() as keys:
            views = _follow(source, first, partial(keys.quits_within, interval))
            if not console.is_interactive:
                for view, problem in views:
                    console.print(render(view, console.width, problem))
                return
            live = Live(console=console, screen=True, auto_refresh=False)
            try:  # and not `with`, whose beginning an interrupt would leave the screen in
                live.start()
                for view, problem in views:
                    live.update(render(view, console.width, problem), refresh=True)
            finally:
                live.stop()
    except KeyboardInterrupt:
        return  # the other way to leave it


class _Keys:
    """The keyboard, where there is one: each key as it is pressed, and not on the screen."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
            self._descriptor = sys.stdin.fileno()
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor, termios.TCSANOW)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._before)

    def quits_within(self, seconds: float) -> bool:
        """Wait so long, or until `q` is pressed."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._descriptor is None:
                time.sleep(left)
            elif select.select([self._descriptor], [], [], left)[0]:
                keys = os.read(self._descriptor, 64)
                if not keys or b"q" in keys.lower():  # the terminal has gone, or told us to
                    return True
        return False


def _follow(
    source: ServerAddress, first: PipelineView, quits: Callable[[], bool]
) -> Iterator[tuple[PipelineView, str]]:
    """What is seen as time goes on; the last view with the problem while there is no new one."""
    view, problem = first, ""
    yield view, problem
    while not quits():
        try:
            view, problem = source.fetch(), ""
        except PipelineError as error:
            problem = str(error)
        yield view, problem


def render(view: PipelineView, width: int, problem: str = "") -> Group:
    """The whole picture."""
    lines = [_summary(view), _latencies(view)]
    if problem:
        lines.append(Text(f"not current: {printable(problem)}", style="bold red"))
    if len(view.replicas) > 1:
        lines.append(_replicas(view.replicas))
    return Group(*lines, *_stage_tables(view, width))


def _summary(view: PipelineView) -> Text:
    engine = view.engine
    state = ("ready", "green") if view.is_ready else ("not ready", "bold red")
    text = Text.assemble((printable(view.model), "bold"), "  ", state)
    if any(stage.ignores_measurements for stage in view.stages):
        text.append("  MEASUREMENTS IGNORED", style="bold red")
    text.append(f"  running {engine.num_running}/{engine.max_batch}")
    text.append(f"  waiting {engine.num_waiting}")
    if engine.num_idle_prefixes:
        text.append(f"  idle prefixes {engine.num_idle_prefixes}")
    if engine.pool_tokens:
        text.append(f"  holding {engine.held_tokens:,} of {engine.pool_tokens:,} tokens")
    if engine.num_given_way:
        text.append(f"  gave way {engine.num_given_way}")
    text.append(f"  {view.latency.tokens_per_second:.1f} tokens/s")
    text.append(f"  failovers {engine.num_failovers}")
    if engine.recovery_seconds:
        text.append(f" (last took {engine.recovery_seconds:.2f} s)")
    return text


def _replicas(replicas: Sequence[ReplicaView]) -> Text:
    text = Text("replicas")
    for each in replicas:
        text.append(f"  {each.replica}: ")
        text.append(each.state, style="green" if each.state is Phase.READY else "yellow")
        text.append(f" {each.num_running} running {each.num_waiting} waiting")
    return text


def _latencies(view: PipelineView) -> Text:
    latency = view.latency

    def pair(p50: float | None, p95: float | None) -> str:
        return "-" if p50 is None or p95 is None else f"p50 {p50 * 1e3:.1f} p95 {p95 * 1e3:.1f} ms"

    ttft = pair(latency.ttft_p50_seconds, latency.ttft_p95_seconds)
    inter_token = pair(latency.inter_token_p50_seconds, latency.inter_token_p95_seconds)
    return Text(f"first token {ttft}   between tokens {inter_token}")


def _stage_tables(view: PipelineView, width: int) -> list[Table]:
    """One row a stage; as many tables, one below the other, as it takes for all to fit."""
    engine = view.engine
    room = engine.pool_tokens or engine.max_batch * (engine.window or engine.max_seq_len)
    num_replicas = max(1, len(view.replicas))
    rows = [
        ({"replica": Text(str(stage.replica))} if num_replicas > 1 else {})
        | _stage_cells(stage, room // num_replicas)
        for stage in view.stages
    ]
    if not rows:
        return []
    names = list(rows[0])
    first = names[: names.index("stage") + 1]  # what tells rows apart, in each part
    parts = [list(first)]
    for name in names[len(first) :]:
        if len(parts[-1]) > len(first) and _table_width([*parts[-1], name], rows) > width:
            parts.append(list(first))
        parts[-1].append(name)
    return [_table(part, rows) for part in parts]


def _table_width(names: Sequence[str], rows: Sequence[Mapping[str, Text]]) -> int:
    widths = [max(len(name), *(row[name].cell_len for row in rows)) for name in names]
    return sum(widths) + _GAP * len(names)


def _table(names: Sequence[str], rows: Sequence[Mapping[str, Text]]) -> Table:
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
    for name in names:
        justify: Literal["left", "right"] = "left" if name in _TEXTUAL else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _stage_cells(stage: StageView, room: int) -> dict[str, Text]:
    figures, rates, age = stage.figures, stage.rates, stage.handshake_age_seconds
    batch = kv_used = "-"
    if figures is not None:
        batch = str(figures.last_batch)
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
        "address": Text("-" if stage.address is None else printable(stage.address)),
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
    if stage.ignores_measurements:
        return Text("pins ignored", style="bold red")
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
