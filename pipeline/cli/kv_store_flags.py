"""Where stages and doors keep sessions, and how much of them."""

from collections.abc import Sequence
from typing import Annotated

from pipeline.cli.quantities import Bytes, Seconds
from pipeline.cli.settings import Flag, Settings
from pipeline.errors import InputError
from pipeline.sessions.kv_store import DEFAULT_MAX_BYTES, DEFAULT_TTL_SECONDS, StoreLimits


class KvStoreFlags(Settings):
    """Which store, and how much of it."""

    kv_store: Annotated[
        str | None,
        Flag(
            "URL",
            "Keep sessions: file:DIR, redis://HOST, memory: [nowhere].",
            older=("INFEMERAL_SERVER_KV_CACHE_DIR",),
        ),
    ] = None
    kv_ttl: Annotated[
        Seconds | None, Flag("TIME", "How long one is kept unused: 90s, 1h, 7d [1h].")
    ] = None
    kv_max_bytes: Annotated[Bytes | None, Flag("SIZE", "All of them: 500M, 2G [2G].")] = None

    @property
    def url(self) -> str | None:
        """The store's; a directory alone means files in it. Raises InputError."""
        if self.kv_store is None and (self.kv_ttl or self.kv_max_bytes) is not None:
            raise InputError("--kv-ttl and --kv-max-bytes are of a store; give --kv-store")
        if self.kv_store is not None and self.kv_store.startswith("/"):
            return f"file:{self.kv_store}"
        return self.kv_store

    def words(self) -> Sequence[tuple[str, object]]:
        """The flags as a worker's command line has them. Raises InputError."""
        return (
            ("--kv-store", self.url),
            ("--kv-ttl", None if self.kv_ttl is None else f"{self.kv_ttl:.0f}s"),
            ("--kv-max-bytes", self.kv_max_bytes),
        )

    @property
    def limits(self) -> StoreLimits:
        """How much of it."""
        return StoreLimits(
            DEFAULT_TTL_SECONDS if self.kv_ttl is None else self.kv_ttl,
            DEFAULT_MAX_BYTES if self.kv_max_bytes is None else self.kv_max_bytes,
        )
