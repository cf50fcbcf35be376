"""Layers behind a door: the flags that name it, and the pipeline that they open."""

import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import trio
from pydantic import model_validator

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import attested_verifier
from pipeline.cli.development import Development
from pipeline.cli.kept_sessions import SessionFlags
from pipeline.cli.pipeline_access import ManifestSource, mode_of
from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.secret_file import SECRET_BYTES, load_secret
from pipeline.cli.settings import Flag, Settings
from pipeline.errors import InputError
from pipeline.leakage.cards import require_card
from pipeline.protocol.peer_connections import GOODBYE_SECONDS
from transport.attestation.interfaces import Verifier
from transport.frozen import frozen
from transport.handshake import Role, RoleKind

if TYPE_CHECKING:  # numpy's and the kernels' time
    from pipeline.doors.door_pipeline import DoorPipeline
    from pipeline.doors.door_session import SessionName
    from pipeline.doors.home_record import HomeRecord, Remembered
    from pipeline.orchestrator.client_ends import ClientEnds

logger = logging.getLogger(__name__)


class DoorFlags(Settings):
    """Which door, and what its transport asks for."""

    door: Annotated[str | None, Flag("URL", "Layers behind a door: grpcs, https or runpod://.")] = (
        None
    )
    door_ca: Annotated[Path | None, Flag("FILE", "Who signs the door's TLS [the system's].")] = None
    door_key_file: Annotated[
        Path | None, Flag("FILE", "Bearer key of the door's HTTP service.")
    ] = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        own = {"--door-ca": self.door_ca, "--door-key-file": self.door_key_file}
        for name, value in own.items():
            if self.door is None and value is not None:
                raise InputError(f"{name} is for layers behind a door; give --door too")
        return self


@frozen
class DoorAccess:
    """How to reach the layers of a manifest behind a door."""

    manifest: Manifest
    flags: DoorFlags
    kept: SessionFlags
    shared: PipelineFlags
    verifier: Verifier
    name: "SessionName"
    ends: "ClientEnds"
    bearer_key: str | None

    @classmethod
    def create(
        cls, source: ManifestSource, flags: DoorFlags, kept: SessionFlags, shared: PipelineFlags
    ) -> "DoorAccess":
        """Check the flags and the protection the manifest gives. Raises InputError."""
        from pipeline.cli.client_part import load_client_ends
        from pipeline.doors.dial import load_bearer_key

        manifest = source.manifest
        require_card(mode_of(manifest))
        _check(manifest, shared)
        verifier = _verifier(manifest, shared.development)
        name = _session_name(kept)
        bearer_key = load_bearer_key(flags.door_key_file, os.environ)
        ends = load_client_ends(manifest, shared.client_part or source.client_dir, shared.workers)
        return cls(manifest, flags, kept, shared, verifier, name, ends, bearer_key)

    async def run(self, work: Callable[["DoorPipeline"], Awaitable[None]]) -> None:
        """Do `work` on the layers behind the door. Raises SessionError, InputError."""
        from pipeline.doors.dial import connect
        from pipeline.doors.door_pipeline import DoorOptions, DoorPipeline
        from pipeline.doors.door_session import DoorPolicy

        policy = DoorPolicy(self.manifest.core_hash(), (self.verifier,))
        async with connect(
            str(self.flags.door),
            is_dev=self.shared.development.dev,
            ca_file=self.flags.door_ca,
            bearer_key=self.bearer_key,
        ) as door:
            record = self._record()
            options = DoorOptions(
                self.name,
                policy,
                self.shared.connect_timeout,
                door.max_body_bytes,
                None if record is None else record.load(),
            )
            codec = self.manifest.activation_spec.codec
            pipeline = DoorPipeline(door, options, self.ends, codec)
            try:
                await work(pipeline)
            finally:
                if record is not None:
                    _remember(record, pipeline.remembered)
                else:
                    with trio.move_on_after(GOODBYE_SECONDS, shield=True):
                        await pipeline.end()

    def _record(self) -> "HomeRecord | None":
        """Where this machine remembers the session, beside its secret; None for one of a run."""
        from pipeline.doors.home_record import HomeRecord

        secret = self.kept.secret_file if self.kept.session else None
        if secret is None:
            return None
        path = secret.with_name(f"{secret.name}.{self.name.session_id}")
        return HomeRecord(path, self.name, self.manifest.core_hash())


def _remember(record: "HomeRecord", remembered: "Remembered | None") -> None:
    """What cannot be remembered is sent again the next time; this run's text is there."""
    try:
        record.save(remembered)
    except (InputError, OSError) as error:
        logger.warning("event=session_not_remembered error=%s", error)


def _check(manifest: Manifest, shared: PipelineFlags) -> None:
    if not manifest.has_client_ends or len(manifest.stages) != 1:
        raise InputError(
            f"--door: this manifest has {len(manifest.stages)} stages and split "
            f"{manifest.split}; a door serves what `plan --stages 1 --split client` writes"
        )
    given = [
        flag
        for flag, is_given in (
            ("--supervise", shared.supervise),
            ("--place", shared.place is not None),
            ("--data-out-listen", shared.data_out_listen is not None),
            ("--data-out-port", shared.data_out_port is not None),
            ("--cid", bool(shared.cid)),
        )
        if is_given
    ]
    given += shared.workers.given(has_client_ends=True)
    if given:
        raise InputError(f"{given[0]} is for stages of one's own, not for a --door")


def _verifier(manifest: Manifest, development: Development) -> Verifier:
    trust = development.trust(manifest)
    if trust is None:
        return attested_verifier(manifest, 0)
    (verifier,) = trust.toward(Role(RoleKind.STAGE, 0), {}).verifiers
    return verifier


def _session_name(flags: SessionFlags) -> "SessionName":
    from pipeline.doors.door_session import SessionName

    if flags.session is None or flags.secret_file is None:
        return SessionName.of_nobody()
    secret = load_secret(flags.secret_file, "--secret-file", may_create=True)
    if len(secret) < SECRET_BYTES:
        raise InputError(
            f"--secret-file: {flags.secret_file} has {len(secret)} bytes; "
            f"it needs at least {SECRET_BYTES}"
        )
    return SessionName.of(flags.session, secret)
