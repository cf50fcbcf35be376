"""A machine of one's own: whom it obeys, what it has, and the stage that it serves."""

import gc
import logging
from functools import partial
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import fingerprint
from pipeline.errors import PipelineError
from pipeline.kernels.base import Kernels
from pipeline.kernels.kernel_selection import choose_kernels
from pipeline.machines.known_homes import KnownHomes
from pipeline.machines.part_store import PartStore
from pipeline.machines.served_stage import (
    Compute,
    Order,
    ServedStage,
    load_served,
    read_order,
    remember,
    remembered,
)
from pipeline.protocol.peer_connections import Entrance
from transport.dial_and_listen import Listener

logger = logging.getLogger(__name__)

# Machines that may see how far this one is; the first go when more come.
MAX_GUESTS = 64
_CALLER_SECONDS = 0.05


class Machine:
    """What one process of `stage-worker serve` is: parts, and one stage at a time."""

    def __init__(
        self,
        own: X25519PrivateKey,
        directory: Path,
        store: PartStore,
        compute: Compute,
        software: str,
        data_in: Listener,
    ) -> None:
        """Raises InputError where the list of homes cannot be read."""
        self.own = own
        self.store = store
        self.compute = compute
        self.software = software
        self._directory = directory
        self.data_in = data_in
        self._known = KnownHomes(directory)
        self._homes = dict.fromkeys(self._known.keys())
        self._guests: dict[bytes, None] = {}
        self._served: ServedStage | None = None
        # Where its sessions come in; made once, since that hashes the manifest.
        self.sessions: Entrance | None = None
        self._changing = trio.Lock()

    @property
    def homes(self) -> frozenset[bytes]:
        """The keys of whom this machine obeys."""
        return frozenset(self._homes)

    @property
    def guests(self) -> tuple[bytes, ...]:
        """The machines that may see how far this one is."""
        return tuple(self._guests)

    @property
    def served(self) -> ServedStage | None:
        """What is served now."""
        return self._served

    def let_in(self, home: bytes) -> None:
        """Obey this home from now on. Raises InputError where that cannot be kept."""
        self._known.add(home)
        self._homes[home] = None
        logger.info("event=joined home=%s", fingerprint(home))

    def admit(self, machine: bytes) -> None:
        """Let a machine see how far this one is."""
        self._guests.pop(machine, None)
        self._guests[machine] = None
        while len(self._guests) > MAX_GUESTS:
            del self._guests[next(iter(self._guests))]

    def kernels(self, head_dim: int) -> Kernels:
        """What a model with such heads would be computed with. Raises InputError."""
        return choose_kernels(self.compute.kernels, head_dim, self.compute.device)

    def is_busy(self, home: bytes | None = None) -> bool:
        """Whether a session is under way, of another home than that."""
        holder = None if self._served is None else self._served.worker.holder_key
        return holder is not None and holder != home

    async def take_up(self, order: Order, home: bytes | None) -> ServedStage:
        """Serve this stage instead of what is served now. Raises PipelineError, serving nothing."""
        async with self._changing:
            manifest = read_order(order, self.store, self.homes)
            await self._let_go()
            await self._forget_callers()
            load = partial(
                load_served, order, manifest, self.own, self._directory, self.store, self.compute
            )
            served = await trio.to_thread.run_sync(load)
            remember(self._directory, order)
            self._served = served
            self.sessions = served.worker.entrance(self.data_in)
        stage = manifest.stage(order.stage_idx)
        logger.info(
            "event=serving stage=%d layers=%d-%d model=%s home=%s",
            order.stage_idx,
            stage.layer_start,
            stage.layer_end,
            manifest.model_name,
            "-" if home is None else fingerprint(home),
        )
        return served

    async def retire(self) -> None:
        """Serve nothing."""
        async with self._changing:
            await self._let_go()
            remember(self._directory, None)

    async def leave(self) -> None:
        """Let the step under way go on, and say that this machine leaves."""
        if self._served is not None:
            await self._served.worker.leave()

    async def _let_go(self) -> None:
        """End the stage that is served, and its memory: two may not fit."""
        if self._served is not None:
            served, self._served, self.sessions = self._served, None, None
            await served.worker.end()
            del served
            gc.collect()

    async def _forget_callers(self) -> None:
        """Hang up on whoever has dialed the data port while nothing was served: to see it open."""
        with trio.move_on_after(_CALLER_SECONDS):
            while True:
                (await self.data_in.accept()).close()

    async def resume(self) -> None:
        """Take up what was served last; what is in the way of that is logged."""
        try:
            order = remembered(self._directory)
            if order is not None:
                await self.take_up(order, None)
        except PipelineError as error:
            logger.warning("event=not_resumed error=%s", error)
