"""Bars while stages that are started here load, and none once there is text."""

from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace

import pytest
import trio

from pipeline.cli import loading_bars, pipeline_access
from pipeline.cli.pipeline_access import PipelineAccess
from pipeline.placement.base import Progress
from pipeline.protocol.time_limits import TimeLimits
from pipeline.worker_report import Loaded

TOLD = [None, Loaded(1, 4), Loaded(4, 4)]


class Loading:
    """Stage 1's worker tells what it has read; stage 0's tells nothing."""

    def progress(self, stage_idx):
        loaded = TOLD[min(int(trio.current_time() - self.began), 2)] if stage_idx else None
        return Progress(1, 0.0, loaded)


@pytest.fixture
def placement():
    return Loading()


@pytest.fixture
def access(placement, monkeypatch):
    @asynccontextmanager
    async def open_pipeline(*arguments):
        placement.began = trio.current_time()
        await trio.sleep(4)
        yield SimpleNamespace(ready=(), kv_pool=None)

    monkeypatch.setattr(pipeline_access, "open_pipeline", open_pipeline)
    return PipelineAccess(
        manifest=SimpleNamespace(stages=(0, 1)),
        trust=None,
        options=SimpleNamespace(times=TimeLimits(connect_seconds=30), limits=None),
        place=lambda tasks: placement,
        is_resumable=False,
    )


@pytest.fixture
def drawn(monkeypatch):
    drawn = []

    @contextmanager
    def progress_rows(names):
        drawn.append(names)
        try:
            yield lambda idx: lambda *loaded: drawn.append((idx, *loaded))
        finally:
            drawn.append("over")

    monkeypatch.setattr(loading_bars, "progress_rows", progress_rows)
    return drawn


async def test_what_stages_have_read_is_drawn_until_they_are_there(access, drawn, autojump_clock):
    async def work(pipeline):
        drawn.append("work")
        await trio.sleep(2)

    await access.run(work, None)
    assert drawn[0] == ["loading stage 0", "loading stage 1"]
    assert [each for n, each in enumerate(drawn) if n == 0 or drawn[n - 1] != each][1:] == [
        (1, 1, 4), (1, 4, 4), "over", "work",
    ]  # fmt: skip


async def test_bars_go_before_it_is_told_that_stages_cannot_be_reached(
    access, drawn, monkeypatch, autojump_clock, placement
):
    @asynccontextmanager
    async def open_pipeline(*arguments):
        placement.began = trio.current_time()
        await trio.sleep(4)
        raise RuntimeError("gave up")
        yield

    monkeypatch.setattr(pipeline_access, "open_pipeline", open_pipeline)
    with pytest.raises(RuntimeError, match="gave up"):
        await access.run(None, None)
    assert drawn[-1] == "over"


async def test_a_pipe_is_given_none(access, capfd, autojump_clock):
    async def work(pipeline):
        pass

    await access.run(work, None)
    assert capfd.readouterr() == ("", "")
