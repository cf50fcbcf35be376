"""Where a stage keeps sessions, and where home keeps its own part of them."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError, PolicyError
from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.sealing import Place
from pipeline.sessions.session_book import HomeSession, SessionBook
from pipeline.sessions.session_keys import SessionKeys
from pipeline.sessions.stage_store import StageStore
from pipeline.sessions.store_url import open_store
from pipeline.stage.slot_storage import SlotStore
from pipeline.stage.worker_setup import StageSetup
from transport.errors import MisuseError
from transport.private_files import create_private, read_private

KvStoreOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Keep sessions: file:DIR, redis://HOST, memory: [nowhere]."),
]
KvTtlOption = Annotated[
    str | None, typer.Option(metavar="TIME", help="How long one is kept unused: 90s, 1h, 7d [1h].")
]
KvMaxBytesOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="All of them: 500M, 2G [2G].")
]
SecretOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Secret that sessions are sealed under; made if need be."),
]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_OF_ALL = StoreLimits()


@dataclass(frozen=True, slots=True)
class StoreFlags:
    """Which store, and how much of it."""

    url: str
    limits: StoreLimits


def store_limits(ttl: str | None, max_bytes: str | None) -> StoreLimits:
    """What the flags say. Raises InputError."""
    ttl_seconds = _OF_ALL.ttl_seconds if ttl is None else _parse("--kv-ttl", ttl, _SECONDS)
    most = _OF_ALL.max_bytes if max_bytes is None else _parse("--kv-max-bytes", max_bytes, _BYTES)
    return StoreLimits(ttl_seconds, int(most))


@asynccontextmanager
async def opened_store(
    flags: StoreFlags | None, setup: StageSetup
) -> AsyncIterator[SlotStore | None]:
    """A stage's store, while the context is open. Raises InputError."""
    if flags is None:
        yield None
        return
    shard = setup.shard
    place = Place(
        session=b"",
        core_hash=setup.manifest.core_hash(),
        layer_start=shard.layer_start,
        layer_end=shard.layer_end,
        precision=setup.precision,
        kernels=shard.kernels.name,
    )
    async with open_store(flags.url, flags.limits) as store:
        yield StageStore(store, place)


def session_book(path: Path, manifest: Manifest) -> SessionBook:
    """The sessions of a secret, which is made if there is none. Raises InputError."""
    if manifest.dp is not None:
        raise InputError("--secret-file: rows are noisy, and what noise was in is not kept")
    try:
        if not path.exists():
            create_private(path, SessionKeys.new_secret())
        keys = SessionKeys(read_private(path))
    except MisuseError as error:
        raise PolicyError(f"--secret-file: {error}") from error
    except OSError as error:
        raise InputError(f"--secret-file: cannot use {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--secret-file {path}: {error}") from error
    directory = path.with_name(path.name + ".sessions")
    core, num_stages = manifest.core_hash(), len(manifest.stages)
    return SessionBook(directory, keys, manifest.model_name, core, num_stages)


def open_session(
    name: str | None, secret_file: Path | None, manifest: Manifest
) -> HomeSession | None:
    """The session that a command line names. Raises InputError."""
    if (name is None) is not (secret_file is None):
        raise InputError("--session and --secret-file go together")
    if name is None or secret_file is None:
        return None
    return session_book(secret_file, manifest).open("", name)


def _parse(flag: str, text: str, units: dict[str, int]) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]?)", text)
    if found is None or found[2] not in units or not float(found[1]):
        known = ", ".join(filter(None, units))
        raise InputError(f"{flag} {text}: give a number above 0 and a unit: {known}")
    return float(found[1]) * units[found[2]]
