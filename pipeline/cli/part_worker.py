"""`stage-worker attention`: answer what a stage asks of a worker that nobody trusts."""

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pipeline.agreement.identity import machine_key
from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.agreement.trust_policy import KeyedTrust, Trust
from pipeline.cli.compute_options import KvMemoryFlag
from pipeline.cli.development import Development
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.logs import LogFormat, configure_logging
from pipeline.cli.settings import Address, Flag, Settings, takes_flags
from pipeline.cli.shared_options import (
    LogFormatFlag,
    ManifestFlag,
    QuietFlag,
    VerboseFlag,
)
from pipeline.cli.signals import run_until_signalled
from pipeline.errors import InputError
from pipeline.remote_parts.parts import part_link
from pipeline.remote_parts.serving import PartHandler, PartServer
from pipeline.units import GIB
from transport.dial_and_listen import listen
from transport.handshake import Role, RoleKind
from transport.tensor_frames import FrameLimits

logger = logging.getLogger(__name__)


IdentityFlag = Annotated[Path | None, Flag("FILE", "This worker's key [the machine's].")]


class PartFlags(Settings):
    """Which manifest's part to be, and where."""

    manifest: ManifestFlag
    listen: Annotated[Address | None, Flag("ADDR", "Where the stage asks [the manifest's].")] = None
    identity: IdentityFlag = None
    once: Annotated[bool, Flag(None, "Exit after the first session.")] = False
    development: Development
    quiet: QuietFlag = False
    verbose: VerboseFlag = False
    log_format: LogFormatFlag = LogFormat.TEXT


class AttentionFlags(PartFlags):
    """And how much of its memory it gives."""

    kv_memory: KvMemoryFlag = None


app = new_app()


@app.command()
@takes_flags(flags=AttentionFlags)
def attention(flags: AttentionFlags) -> None:
    """Hold encoded keys and values for the stage of a manifest, and attend to them.

    The worker has no key and no weights. It prints `event=listening` and serves one session after
    another, or several side by side, until stopped.

    \b
        stage-worker attention --manifest manifest.json --dev
    """
    from pipeline.kernels.host_memory import available_bytes
    from pipeline.kernels.runtime import pin_blas
    from pipeline.scx.attention_wire import QUESTION_LIMITS
    from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker

    pin_blas()  # its threads would spin between questions
    free = GIB * flags.kv_memory if flags.kv_memory is not None else available_bytes()
    memory = AttentionMemory(None if free is None else int(free))
    serve_part(flags, "attention", QUESTION_LIMITS, lambda: AttentionWorker(memory))


def serve_part(
    flags: PartFlags,
    kind: str,
    limits: FrameLimits,
    new_handler: Callable[[], PartHandler],
) -> None:
    """Serve until stopped. Raises InputError, PolicyError."""
    configure_logging(
        verbose=flags.verbose,
        quiet=flags.quiet,
        log_format=flags.log_format,
        marks=flags.development.marks,
    )
    manifest = load_manifest(flags.manifest)
    if manifest.part is None or manifest.part.kind != kind:
        raise InputError(f"{flags.manifest} has no part of kind {kind}; plan it with --{kind}")
    address = manifest.part.address
    where = flags.listen or (None if address is None else address.to_endpoint())
    if where is None:
        raise InputError("the manifest's part has no address; give --listen")
    trust = _trust(manifest, flags)
    credentials = trust.toward(Role(RoleKind.STAGE, 0), {})
    server = PartServer(part_link(manifest), credentials, limits, new_handler)

    async def main() -> None:
        with listen(where) as listener:
            logger.info("event=listening part=%s address=%s core=%s", kind, listener.endpoint,
                        manifest.core_hash().hex()[:16])  # fmt: skip
            await server.serve(listener, once=flags.once)

    number = run_until_signalled(main)
    if number is not None:
        logger.info("event=stopped part=%s signal=%s", kind, signal.Signals(number).name)


def _trust(manifest: Manifest, flags: PartFlags) -> Trust:
    """The trust of those that the manifest names by their keys. Raises PolicyError."""
    development = flags.development.trust(manifest)
    return development or KeyedTrust.for_part(manifest, machine_key(flags.identity))


def main() -> None:
    """Console entry point."""
    run_app(app, "stage-worker attention")
