"""Going on after a loss: the pipeline is mended, and the work resumed where it was certain."""

import logging
from collections.abc import Awaitable, Callable, Iterator

import trio

from pipeline.errors import SessionError, SessionRefused, StageAbsent, StageMismatch
from pipeline.orchestrator.connect_deadline import Patience
from pipeline.orchestrator.epochs import ReplaySource
from pipeline.orchestrator.remote_pipeline import Pipeline

logger = logging.getLogger(__name__)

# Between attempts to mend a pipeline; most succeed at the first.
FIRST_PAUSE_SECONDS = 0.05
LAST_PAUSE_SECONDS = 1.0
# One that breaks again and again is mended at once only if it stood for so long, or did any work.
STEADY_SECONDS = 10.0
# A request that breaks a stage whenever it is computed would keep everybody waiting for ever.
MAX_FRUITLESS = 5

Work = Callable[[Pipeline], Awaitable[None]]


async def run_with_failover(
    pipeline: Pipeline,
    work: Work,
    source: ReplaySource,
    patience_seconds: float,
    told: set[str] | None = None,
) -> None:
    """Connect `pipeline` and do `work` on it; whatever is lost, mend it and call `work` again.

    Raises SessionRefused when a stage will not take part as it is asked to, StageAbsent when one is
    not up and no attempt is left, SessionError when the
    pipeline does not stand again and nothing moves for `patience_seconds` (StageMismatch where a
    stage was there and not the one of the manifest), or when it breaks again and again without a
    single result. `told`: what has been logged of this loss already, and need not be again.
    """
    num_fruitless = 0
    pauses = _pauses()
    while True:
        before = pipeline.num_results, source.num_given_up
        await _mend(pipeline, source, patience_seconds, told)
        told = None
        stood_at = trio.current_time()
        try:
            async with pipeline.unbroken():
                return await work(pipeline)
        except SessionRefused:
            raise
        except SessionError as error:
            logger.warning("event=failover_started error=%s", error)
            is_fruitless = before == (pipeline.num_results, source.num_given_up)
            num_fruitless = num_fruitless + 1 if is_fruitless and source.has_work else 0
            if num_fruitless > MAX_FRUITLESS:
                raise
        if is_fruitless and trio.current_time() - stood_at < STEADY_SECONDS:
            await trio.sleep(next(pauses))
        else:
            pauses = _pauses()


async def _mend(
    pipeline: Pipeline, source: ReplaySource, patience_seconds: float, told: set[str] | None
) -> None:
    failure: SessionError | None = None
    told = set() if told is None else told

    async def connect() -> None:
        nonlocal failure
        for pause_seconds in _pauses():
            failure = None  # of an attempt before this one: its stages may have come back since
            try:
                await pipeline.connect(source)
            except (SessionRefused, StageAbsent):
                raise
            except SessionError as error:
                # Again and again the same is said once.
                is_known = str(error) in told
                told.add(str(error))
                level = logging.DEBUG if is_known else logging.WARNING
                logger.log(level, "event=connecting_failed error=%s", error)
                failure = error
            else:
                return
            await trio.sleep(pause_seconds)

    if not await Patience(patience_seconds, lambda: pipeline.progress).run(connect):
        kind = StageMismatch if isinstance(failure, StageMismatch) else SessionError
        raise kind(
            f"gave up after {patience_seconds:g} s: {failure or pipeline.waiting_for}"
        ) from failure


def _pauses() -> Iterator[float]:
    seconds = FIRST_PAUSE_SECONDS
    while True:
        yield seconds
        seconds = min(2 * seconds, LAST_PAUSE_SECONDS)
