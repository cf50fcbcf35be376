"""Stages joined up for as long as a context is open, and texts generated on them."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation, TokenOutput
from pipeline.engine.limits import Limits
from pipeline.engine.request_time import request_time
from pipeline.errors import SessionError
from pipeline.orchestrator.failover import run_with_failover
from pipeline.orchestrator.open_pipeline import new_pipeline
from pipeline.orchestrator.remote_pipeline import Pipeline, PipelineOptions
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.tasks import open_tasks
from transport.dial_and_listen import Endpoint

GREEDY = SamplingParams(temperature=0.0)


class Connection:
    """A working pipeline; any number of tasks may generate at the same time."""

    def __init__(
        self,
        engine: PipelineEngine,
        pipeline: Pipeline,
        manifest: Manifest,
        request_seconds: float | None = None,
    ) -> None:
        self._engine = engine
        self._pipeline = pipeline
        self._manifest = manifest
        self._request_seconds = request_seconds

    @property
    def vocab_size(self) -> int:
        """Token ids the model has."""
        return self._pipeline.vocab_size

    async def generate(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams = GREEDY,
        eos_token_ids: frozenset[int] | None = None,
    ) -> AsyncIterator[TokenOutput]:
        """The tokens that follow, as they come.

        Who stops before the last closes it, which gives up the rest: `contextlib.aclosing`.

        `sampling`: how they are chosen; `eos_token_ids`: what ends the text, the manifest's if not
        given. A stage that is lost meanwhile is waited for; the text is what it would have been.

        Raises PromptError for a prompt that can never fit, InputError for what is no token of the
        model, SessionError when the stages do not come back, RequestTimedOut when this text has had
        its time, RequestFailed when it alone cannot go on.
        """
        if eos_token_ids is None:
            eos_token_ids = frozenset(self._manifest.eos_token_ids)
        generation = Generation(
            tuple(prompt_ids), max_tokens, eos_token_ids, sampling, vocab_size=self.vocab_size
        )
        began = trio.current_time()
        async with self._engine.generate(generation) as tokens:
            while True:
                with request_time(self._request_seconds, began):  # never around a `yield`
                    try:
                        token = await tokens.receive()
                    except trio.EndOfChannel:
                        return
                yield token


@asynccontextmanager
async def connect(
    manifest: Manifest,
    trust: Trust,
    *,
    max_requests: int = 1,
    context: int | None = None,
    times: TimeLimits = DEFAULT_TIMES,
    data_out_listen: Endpoint | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Connection]:
    """Join up the stages of a manifest, wherever they run, and stay so.

    `max_requests` are computed side by side, others wait; each has room for `context` tokens, its
    prompt included [the manifest's]. `times`: how long to wait for what; stages that are not there
    are waited for as long as something moves and then for its `connect_seconds`, and each text has
    its `request_seconds`. `data_out_listen`: where the last stage delivers [its data_out];
    `progress` hears what is waited for.

    Raises InputError, and SessionError naming the stage that is missing, refused or not itself.
    """
    room = context or manifest.activation_spec.max_seq_len
    limits = Limits(max_requests, room, num_stages=len(manifest.stages))
    engine = PipelineEngine(limits)
    options = PipelineOptions(limits, times, data_out_listen)
    has_stood = trio.Event()

    async def work(pipeline: Pipeline) -> None:
        has_stood.set()
        await engine.run(pipeline)

    async def drive() -> None:
        try:
            await run_with_failover(pipeline, work, engine.scheduler, times.connect_seconds)
        except SessionError as error:
            engine.fail(error)  # to those who wait for tokens, and who ask for more
            if not has_stood.is_set():
                raise

    async with (
        new_pipeline(manifest, trust, options, progress) as pipeline,
        open_tasks() as tasks,
    ):
        tasks.start_soon(drive)
        await has_stood.wait()
        yield Connection(engine, pipeline, manifest, times.request_seconds)
        tasks.cancel_scope.cancel()
