"""The process that speaks with an engine: orders on stdin, news on stdout; it ends with stdin."""

import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial

import trio
from pydantic import ValidationError

from pipeline.agreement.addresses import Strict
from pipeline.placement.ray.engine import Engine, EngineError, EngineUnusable, RayEngine
from pipeline.placement.ray.messages import (
    Away,
    Cluster,
    Job,
    Kept,
    Lose,
    Report,
    Start,
    cut,
    line_of,
    parse_order,
)
from pipeline.tasks import open_tasks

# Before a keeper that has not answered is asked again.
PAUSE_SECONDS = 0.1
# Between two looks at whether the cluster answers, and how long it has for that.
CHECK_SECONDS = 2.0
SILENT_SECONDS = 5.0

in_thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True)


class EngineService:
    """Does what the orchestrator orders, and tells what comes of it."""

    def __init__(self, engine: Engine, tell: Callable[[Strict], None]) -> None:
        self._engine = engine
        self._tell = tell
        # What was last told of the cluster.
        self._cluster: Cluster | None = None
        self._is_connected = trio.Event()

    async def serve(self, orders: AsyncIterator[bytes]) -> None:
        """Until there are no more orders; then nothing is left of what they have started."""
        try:
            async with open_tasks() as tasks:
                tasks.start_soon(self._watch, tasks.cancel_scope)
                async for line in orders:
                    tasks.start_soon(self._obey, line)
                tasks.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._engine.close)

    async def _obey(self, line: bytes) -> None:
        order = parse_order(line)
        await self._is_connected.wait()
        match order:
            case Start(stage_idx=idx):
                await self._follow(idx)
            case Lose(stage_idx=idx, kind=kind):
                await in_thread(self._engine.lose, idx, kind)

    async def _follow(self, stage_idx: int) -> None:
        """Have the stage kept, and pass on what its keepers say."""
        await in_thread(self._engine.keep, stage_idx)
        seen = -1
        while True:
            try:
                seen, text = await in_thread(self._engine.report, stage_idx, seen)
                kept = Kept.model_validate_json(text)
            except (EngineError, ValidationError) as error:
                seen = -1
                self._tell(Away(stage_idx=stage_idx, reason=cut(str(error))))
                await trio.sleep(PAUSE_SECONDS)
            else:
                self._tell(Report(stage_idx=stage_idx, kept=kept))

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Connect, and tell whether the cluster answers from then on."""
        try:
            await self._ask(self._engine.connect)
        except EngineUnusable as error:
            self._tell(Cluster(reason=cut(str(error)), is_unusable=True))
            scope.cancel()
            return
        self._is_connected.set()
        while True:
            try:
                await self._ask(self._engine.check)
                self._note(None)
            except EngineError as error:
                self._note(cut(str(error)))
            await trio.sleep(CHECK_SECONDS)

    async def _ask(self, call: Callable[[], None]) -> None:
        """Raises what the call does; tells of it where that takes long."""
        async with open_tasks() as tasks:
            tasks.start_soon(self._note_silence)
            await in_thread(call)
            tasks.cancel_scope.cancel()

    async def _note_silence(self) -> None:
        await trio.sleep(SILENT_SECONDS)
        self._note(f"its head has not answered for {SILENT_SECONDS:g} s")

    def _note(self, reason: str | None) -> None:
        found = Cluster(reason=reason)
        if found != self._cluster:
            self._cluster = found
            self._tell(found)


async def lines_of(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    """Its lines, without their ends."""
    unread = b""
    async for data in stream:
        *lines, unread = (unread + data).split(b"\n")
        for line in lines:
            yield line


def run(new_engine: Callable[[Job], Engine]) -> None:
    """Serve the orchestrator that has started this process, and holds its stdin."""
    # Ctrl-C reaches every process of a terminal; whoever has started this one says when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints is no news.
    news = os.dup(1)
    os.dup2(2, 1)

    async def main() -> None:
        async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
            lines = lines_of(stdin)
            job = Job.model_validate_json(await anext(lines))
            service = EngineService(new_engine(job), lambda said: _write(news, line_of(said)))
            await service.serve(lines)

    trio.run(main)
    # Ray's threads, and those that still wait for it, have nothing more to do.
    os._exit(0)


def main() -> None:
    """Serve by Ray."""
    run(RayEngine)


def _write(fd: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        pass  # nobody is there any more, as stdin tells
