"""The `pipeline-relay` command."""

import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import trio
import typer

from transport.dial_and_listen import parse_cids, parse_endpoint
from transport.errors import EndpointError
from transport.installed_version import tell_version
from transport.relay import DEFAULT_MAX_CONNECTIONS, Relay, RelayMap, parse_map
from transport.relay_manifest import manifest_maps

EXIT_RUNTIME: Final = 1
EXIT_USAGE: Final = 2
METRICS_PERIOD_S: Final = 5.0

_EPILOG: Final = """
Addresses: HOST:PORT, tcp:HOST:PORT, [IPV6]:PORT, unix:/PATH, vsock:CID:PORT, and unix:/PATH:PORT
for a vsock bridged over a UNIX socket (dialing writes CONNECT PORT; listening binds /PATH_PORT).

Examples:

Users reach an enclave with CID 16:  pipeline-relay --map tcp:0.0.0.0:9000=vsock:16:5000

An enclave reaches the next parent:  pipeline-relay --map vsock:3:5001=tcp:10.0.0.7:9001

All stages of a manifest, on their parent:  pipeline-relay --manifest M --results USER_HOST:9100
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def parse_maps(texts: Sequence[str], max_connections: int) -> tuple[RelayMap, ...]:
    """The maps of a command line. Raises: EndpointError, also where two listen on one address."""
    return distinct([parse_map(text, max_connections) for text in texts])


def distinct(maps: Sequence[RelayMap]) -> tuple[RelayMap, ...]:
    """The same maps. Raises: EndpointError where two listen on one address."""
    listening = [mapping.listen for mapping in maps]
    for endpoint in listening:
        if listening.count(endpoint) > 1:
            raise EndpointError(f"{endpoint} listens for more than one map; give each its own")
    return tuple(maps)


def metrics(relay: Relay) -> dict[str, list[dict[str, str | int]]]:
    """Every map's counters, as JSON takes them."""
    return {
        "maps": [
            {
                "listen": str(relay.listeners[mapping].endpoint),
                "target": str(mapping.target),
                "max_connections": mapping.max_connections,
                **asdict(stats),
            }
            for mapping, stats in relay.stats.items()
        ]
    }


def write_metrics(relay: Relay, path: Path) -> None:
    """Replaces the file in one step: a reader sees the old counters or the new, never half.

    Raises: OSError.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        aside.write_text(json.dumps(metrics(relay), indent=2) + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


async def _write_metrics_forever(relay: Relay, path: Path) -> None:
    while True:
        await trio.sleep(METRICS_PERIOD_S)
        try:
            write_metrics(relay, path)
        except OSError as error:  # a full disk must not cut the connections
            logging.getLogger(__name__).warning("metrics lost path=%s error=%s", path, error)


async def _run(relay: Relay, metrics_out: Path | None) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.run)
            if metrics_out is not None:
                nursery.start_soon(_write_metrics_forever, relay, metrics_out)
            if not relay.listeners:
                print(
                    "nothing to relay: on this machine stages are dialed as they are",
                    file=sys.stderr,
                )
            for mapping, listener in relay.listeners.items():
                print(f"relaying {listener.endpoint} -> {mapping.target}", file=sys.stderr)
            async for number in signals:
                logging.getLogger(__name__).info("stopping signal=%s", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


@app.command(epilog=_EPILOG)
def relay_command(
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="LISTEN=TARGET",
            help="Carry connections from LISTEN to TARGET. Repeat for several.",
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Carry what the stages of this manifest need."),
    ] = None,
    results: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="With --manifest: the orchestrator's --data-out-listen."
        ),
    ] = None,
    cids: Annotated[
        list[str] | None,
        typer.Option(
            "--cid",
            metavar="STAGE=CID",
            help="With --manifest: a started enclave's, if not 16 + STAGE. Repeat for several.",
        ),
    ] = None,
    listen_host: Annotated[
        str, typer.Option(metavar="HOST", help="With --manifest: listen for TCP on this address.")
    ] = "0.0.0.0",  # noqa: S104 - users come from outside, and what listens is blind
    max_connections: Annotated[
        int,
        typer.Option(min=1, help="Connections at a time for each map; unanswered ones go first."),
    ] = DEFAULT_MAX_CONNECTIONS,
    metrics_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Write counters here every 5 s and at the end, atomically."
        ),
    ] = None,
) -> None:
    """Carry bytes between TCP, vsock and UNIX sockets without understanding them.

    Runs on the parent instance of an enclave, which has no network of its own. All it sees is the
    ciphertext of channels that authenticate their ends: it can delay or cut them, not read or
    change them. Ends with SIGTERM or Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        parsed = list(parse_maps(maps or [], max_connections))
        if manifest is not None:
            target = parse_endpoint(results) if results is not None else None
            started = parse_cids(cids or [])
            parsed += manifest_maps(manifest, listen_host, target, max_connections, started)
        elif results is not None or cids:
            raise EndpointError("--results and --cid go with --manifest")
        if not parsed and manifest is None:
            raise EndpointError("nothing to carry; give --map or --manifest")
        distinct(parsed)
    except EndpointError as error:
        raise _failure(error, EXIT_USAGE) from error
    if metrics_out is not None and not (
        metrics_out.parent.is_dir() and os.access(metrics_out.parent, os.W_OK)
    ):
        raise _failure(
            f"cannot write {metrics_out}: {metrics_out.parent} is no writable directory; "
            "create it first",
            EXIT_USAGE,
        )
    failure: BaseException | None = None
    try:
        relay = Relay(parsed)
        trio.run(_run, relay, metrics_out)
        if metrics_out is not None:
            write_metrics(relay, metrics_out)
    except* (EndpointError, OSError) as group:
        failure = group
        while isinstance(failure, BaseExceptionGroup):
            failure = failure.exceptions[0]
    if failure is not None:
        raise _failure(failure, EXIT_RUNTIME)


def _failure(problem: object, code: int) -> typer.Exit:
    print(f"pipeline-relay: {problem}", file=sys.stderr)
    return typer.Exit(code)


def main() -> None:
    """Entry point of the command."""
    tell_version("pipeline-relay")
    try:
        app()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # of stdout, as with `| head`
            sys.exit(128 + signal.SIGPIPE)
        raise


if __name__ == "__main__":
    main()
