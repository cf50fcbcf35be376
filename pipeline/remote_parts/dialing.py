"""A link to a manifest's worker for a program that runs no event loop, and is no stage."""

import os
from pathlib import Path

import trio

from pipeline.agreement.identity import machine_key
from pipeline.agreement.manifest import load_manifest
from pipeline.agreement.trust_policy import DevTrust, KeyedTrust, Trust
from pipeline.errors import InputError, PartLost
from pipeline.remote_parts.link import PartLink
from pipeline.remote_parts.parts import PartAccess, RemoteParts
from transport.attestation.dev_authority import default_directory
from transport.tensor_frames import FrameLimits

# Whoever starts a worker beside his program need not wait for it himself.
CONNECT_SECONDS = 30.0


def dial_worker(
    path: Path, kind: str, limits: FrameLimits, *, identity: Path | None, dev: bool
) -> PartLink:
    """Be the stage of a manifest, known by its key, and dial the worker that it asks.

    `limits`: of what comes for an answer. `dev`: in development nobody needs a key. Raises
    InputError for a manifest without such a worker, PolicyError, PartLost, PartRefused.
    """
    manifest = load_manifest(path)
    if manifest.part is None or manifest.part.kind != kind:
        raise InputError(f"{path} has no part of kind {kind}; plan it with --{kind}")
    trust: Trust
    if dev:
        trust = DevTrust.for_manifest(manifest, default_directory(os.environ))
    else:
        trust = KeyedTrust.create(manifest, 0, machine_key(identity))
    access = PartAccess(manifest, trust, RemoteParts(limits))
    waited = f"the {kind} worker of {path} is not up"

    def on_waiting(text: str) -> None:
        nonlocal waited
        waited = text

    async def dial() -> PartLink:
        with trio.fail_after(CONNECT_SECONDS):
            return await access.dial(on_waiting)

    try:
        return trio.run(dial)
    except trio.TooSlowError as error:
        raise PartLost(waited) from error
