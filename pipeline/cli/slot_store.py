"""Where a stage keeps its part of sessions. Apart from home's: a stage carries nothing of that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pipeline.cli.kv_store_flags import KvStoreFlags
from pipeline.stage.slot_storage import SlotStore
from pipeline.stage.worker_setup import StageSetup


@asynccontextmanager
async def opened_store(flags: KvStoreFlags, setup: StageSetup) -> AsyncIterator[SlotStore | None]:
    """A stage's store, while the context is open. Raises InputError."""
    url = flags.url
    if url is None:
        yield None
        return
    from pipeline.sessions.sealing import Place
    from pipeline.sessions.stage_store import StageStore
    from pipeline.sessions.store_url import open_store

    shard = setup.shard
    place = Place(
        session=b"",
        core_hash=setup.manifest.core_hash(),
        layer_start=shard.layer_start,
        layer_end=shard.layer_end,
        precision=setup.precision,
        kernels=shard.kernels.name,
    )
    async with open_store(url, flags.limits) as store:
        yield StageStore(store, place)
