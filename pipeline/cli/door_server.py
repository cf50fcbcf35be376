"""`stage-worker door`: serve a client-split shard over requests and answers."""

import logging
import signal
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

from pydantic import Field, PlainValidator

from pipeline.agreement.manifest import check_precision
from pipeline.agreement.trust_policy import DEV_WARNING
from pipeline.cli.compute_options import DeviceFlag, DTypeFlag, KernelsFlag, ThreadsFlag
from pipeline.cli.development import Development
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.kv_store_flags import KvStoreFlags
from pipeline.cli.logs import LogFormat, configure_logging
from pipeline.cli.model_directory import ModelDir
from pipeline.cli.settings import Address, Count, Flag, Settings, parse_address, takes_flags
from pipeline.cli.shared_options import (
    MAX_CONTEXT_VARIABLE,
    LogFormatFlag,
    QuietFlag,
    VerboseFlag,
)
from pipeline.cli.signals import run_until_signalled
from pipeline.cli.worker_flags import OLDER_WEIGHTS, TENSORIZED_VARIABLE
from pipeline.doors.listening import DoorServer, Listening, listen
from pipeline.doors.served_shard import NUM_SESSIONS, ShardOptions, load_door, open_served
from pipeline.errors import InputError, PolicyError
from pipeline.gateway.auth import is_local_name
from pipeline.gateway.http.tls import load_tls
from transport.dial_and_listen import Endpoint, TcpEndpoint

logger = logging.getLogger(__name__)


def _port_or_address(text: object) -> Endpoint:
    """The older system's variable is a port of every address."""
    return parse_address(f"0.0.0.0:{text}" if str(text).isdecimal() else text)


PortOrAddress = Annotated[Endpoint, PlainValidator(_port_or_address)]

app = new_app()


class DoorServerFlags(Settings):
    """Which shard to serve where, for how many, and where their sessions are kept."""

    model_dir: Annotated[
        ModelDir,
        Flag(
            "DIR|NAME",
            "The server's shard, of all layers.",
            older=OLDER_WEIGHTS,
            if_there=frozenset({TENSORIZED_VARIABLE}),
        ),
    ]
    grpc: Annotated[
        PortOrAddress | None,
        Flag("HOST:PORT", "Where to serve gRPC.", older=("INFEMERAL_SERVER_GRPC_PORT",)),
    ] = None
    http: Annotated[Address | None, Flag("HOST:PORT", "Where to serve JSON over HTTP.")] = None
    manifest: Annotated[Path | None, Flag("FILE", "The manifest [beside the shard].")] = None
    tls_cert: Annotated[Path | None, Flag("FILE", "Certificate chain, PEM.")] = None
    tls_key: Annotated[Path | None, Flag("FILE", "Its key, PEM.")] = None
    max_sessions: Annotated[
        Annotated[int, Field(ge=1, le=4096)], Flag("N", "Sessions at once.")
    ] = NUM_SESSIONS
    context: Annotated[
        Count | None, Flag("N", "Positions of each [manifest's].", older=(MAX_CONTEXT_VARIABLE,))
    ] = None
    store: KvStoreFlags
    older_key: Annotated[
        Path | None, Flag("FILE", "RSA key that older clients seal to, PEM [none].")
    ] = None
    dtype: DTypeFlag = None
    kernels: KernelsFlag = None
    threads: ThreadsFlag = None
    device: DeviceFlag = None
    development: Development
    quiet: QuietFlag = False
    verbose: VerboseFlag = False
    log_format: LogFormatFlag = LogFormat.TEXT


@app.command()
@takes_flags(flags=DoorServerFlags)
def serve_door(flags: DoorServerFlags) -> None:
    """Serve a client-split shard over gRPC, HTTP or both until stopped.

    The door loads its shard, checks its hashes and prints `event=listening`. Told to stop, it
    finishes the calls that run.

    \b
        stage-worker door --grpc 127.0.0.1:50051 --http 127.0.0.1:8000 \\
                          --model-dir shards/stage0 --dev
    """
    configure_logging(
        verbose=flags.verbose,
        quiet=flags.quiet,
        log_format=flags.log_format,
        marks=flags.development.marks,
    )
    places = {
        flag: _address(
            endpoint, flag, has_tls=flags.tls_cert is not None, dev=flags.development.dev
        )
        for flag, endpoint in (("--grpc", flags.grpc), ("--http", flags.http))
        if endpoint is not None
    }
    if not places:
        raise InputError("a door needs --grpc HOST:PORT, --http HOST:PORT or both")
    tls = {
        "--grpc": load_tls(flags.tls_cert, flags.tls_key, "h2"),
        "--http": load_tls(flags.tls_cert, flags.tls_key),
    }
    url = flags.store.url
    if flags.development.dev:
        logger.warning("event=development_mode %s", DEV_WARNING)
    options = ShardOptions(
        model_dir=flags.model_dir,
        manifest=flags.manifest,
        is_dev=flags.development.dev,
        ignores_measurements=flags.development.ignore_measurements,
        num_sessions=flags.max_sessions,
        max_seq_len=flags.context,
        dtype=None if flags.dtype is None else check_precision(flags.dtype),
        kernels=flags.kernels or "auto",
        threads=flags.threads or 1,
        device=flags.device or "cpu",
        older_key=flags.older_key,
        kv_store=url,
        store_limits=flags.store.limits,
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


def _address(endpoint: Endpoint, flag: str, *, has_tls: bool, dev: bool) -> TcpEndpoint:
    """Where to listen. Raises InputError, PolicyError."""
    if not isinstance(endpoint, TcpEndpoint):
        raise InputError(f"{flag} {endpoint}: a door listens on HOST:PORT")
    # Bodies are sealed; but who asks when for which session, how long prompts are and every
    # refusal could be read on the way, and the latter made up.
    if not has_tls and not dev and not is_local_name(endpoint.host):
        raise PolicyError(
            f"{flag} {endpoint} is open to other machines; give --tls-cert and --tls-key, "
            "listen on 127.0.0.1 behind a proxy, or use --dev"
        )
    return endpoint


def _shown(place: Listening) -> str:
    host, port = place.listeners[0].socket.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main() -> None:
    """Console entry point."""
    run_app(app, "stage-worker door")
