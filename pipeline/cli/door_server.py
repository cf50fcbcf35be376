"""`stage-worker door`: serve a client-split shard over requests and answers."""

import logging
import signal
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.manifest import check_precision
from pipeline.agreement.trust_policy import DEV_WARNING
from pipeline.cli.compute_options import (
    DeviceOption,
    DTypeOption,
    KernelsOption,
    ThreadsOption,
)
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.logs import LogFormat, LogFormatOption, configure_logging
from pipeline.cli.quantities import parse_bytes, parse_seconds
from pipeline.cli.shared_options import DevOption, VerboseOption, to_endpoint
from pipeline.cli.signals import run_until_signalled
from pipeline.doors.listening import DoorServer, Listening, listen
from pipeline.doors.served_shard import NUM_SESSIONS, ShardOptions, load_door, open_served
from pipeline.errors import InputError, PolicyError
from pipeline.gateway.auth import is_local_name
from pipeline.gateway.http.tls import load_tls
from pipeline.sessions.kv_store import (
    DEFAULT_MAX_BYTES,
    DEFAULT_TTL_SECONDS,
    StoreLimits,
)
from transport.dial_and_listen import TcpEndpoint

logger = logging.getLogger(__name__)

OLDER_VARIABLES = {"--model-dir": ("INFEMERAL_SERVER_WEIGHTS_PATH",)}

app = new_app()


@app.command()
def serve_door(
    model_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="The server's shard, of all layers.")
    ],
    grpc: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to serve gRPC.")
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to serve JSON over HTTP.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The manifest [beside the shard].")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key, PEM.")] = None,
    max_sessions: Annotated[
        int, typer.Option(min=1, max=4096, metavar="N", help="Sessions at once.")
    ] = NUM_SESSIONS,
    context: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Positions of each [manifest's].")
    ] = None,
    kv_store: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Keeps sessions: memory:, file:DIR, redis:// [nowhere]."),
    ] = None,
    kv_ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long, after their last use [1h].")
    ] = None,
    kv_max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="And how much of all of them [2G].")
    ] = None,
    older_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="RSA key that older clients seal to, PEM [none]."),
    ] = None,
    dtype: DTypeOption = None,
    kernels: KernelsOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    dev: DevOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")
    ] = False,
    verbose: VerboseOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Serve a client-split shard over gRPC, HTTP or both until stopped.

    The door loads its shard, checks its hashes and prints `event=listening`. Told to stop, it
    finishes the calls that run.

    \b
        stage-worker door --grpc 127.0.0.1:50051 --http 127.0.0.1:8000 \\
                          --model-dir shards/stage0 --dev
    """
    configure_logging(verbose=verbose, quiet=quiet, log_format=log_format)
    places = {
        flag: _address(text, flag, has_tls=tls_cert is not None, dev=dev)
        for flag, text in (("--grpc", grpc), ("--http", http))
        if text is not None
    }
    if not places:
        raise InputError("a door needs --grpc HOST:PORT, --http HOST:PORT or both")
    tls = {
        "--grpc": load_tls(tls_cert, tls_key, "h2"),
        "--http": load_tls(tls_cert, tls_key),
    }
    if kv_store is None and (kv_ttl or kv_max_bytes) is not None:
        raise InputError("--kv-ttl and --kv-max-bytes are of a store; give --kv-store")
    if dev:
        logger.warning("event=development_mode %s", DEV_WARNING)
    options = ShardOptions(
        model_dir=model_dir,
        manifest=manifest,
        is_dev=dev,
        num_sessions=max_sessions,
        max_seq_len=context,
        dtype=None if dtype is None else check_precision(dtype),
        kernels=kernels or "auto",
        threads=threads or 1,
        device=device or "cpu",
        older_key=older_key,
        kv_store=kv_store,
        store_limits=StoreLimits(
            DEFAULT_TTL_SECONDS if kv_ttl is None else parse_seconds(kv_ttl, "--kv-ttl"),
            DEFAULT_MAX_BYTES
            if kv_max_bytes is None
            else parse_bytes(kv_max_bytes, "--kv-max-bytes"),
        ),
    )
    _run(options, places, tls)


def _run(
    options: ShardOptions,
    places: dict[str, TcpEndpoint],
    tls: dict[str, ssl.SSLContext | None],
) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            open_at = {}
            # An address that is taken is found out before the weights are loaded.
            for flag, place in places.items():
                listeners = await listen(place.host, place.port)
                for each in listeners:
                    await stack.enter_async_context(each)
                open_at[flag] = Listening(listeners, tls[flag])
            setup = load_door(options)
            door = await stack.enter_async_context(open_served(setup, options))
            logger.info(
                "event=listening door=open sessions=%d kernels=%s core=%s%s",
                setup.num_sessions,
                setup.shard.kernels.name,
                setup.manifest.core_hash().hex()[:16],
                "".join(f" {flag[2:]}={_shown(place)}" for flag, place in open_at.items()),
            )
            await DoorServer(door).serve(open_at.get("--grpc"), open_at.get("--http"))

    number = run_until_signalled(main)
    if number is not None:
        logger.info("event=stopped door=closed signal=%s", signal.Signals(number).name)


def _address(text: str, flag: str, *, has_tls: bool, dev: bool) -> TcpEndpoint:
    """Where to listen. Raises InputError, PolicyError."""
    endpoint = to_endpoint(text, flag)
    if not isinstance(endpoint, TcpEndpoint):
        raise InputError(f"{flag} {text}: a door listens on HOST:PORT")
    # Bodies are sealed; but who asks when for which session, how long prompts are and every
    # refusal could be read on the way, and the latter made up.
    if not has_tls and not dev and not is_local_name(endpoint.host):
        raise PolicyError(
            f"{flag} {text} is open to other machines; give --tls-cert and --tls-key, listen on "
            "127.0.0.1 behind a proxy, or use --dev"
        )
    return endpoint


def _shown(place: Listening) -> str:
    host, port = place.listeners[0].socket.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main() -> None:
    """Console entry point."""
    run_app(app, "stage-worker door", OLDER_VARIABLES)
