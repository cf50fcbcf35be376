"""The orchestrator: opens a pipeline on the user's side and closes it again."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from pipeline.connector import Connector, Progress
from pipeline.errors import InputError, SessionError
from pipeline.manifest import Manifest
from pipeline.remote_pipeline import Pipeline, PipelineOptions
from pipeline.steps import ACTIVATION_DTYPES, SessionLimits
from pipeline.tasks import open_tasks
from pipeline.trust import Trust
from transport.endpoint import listen
from transport.errors import EndpointError

__all__ = ["Pipeline", "PipelineOptions", "new_pipeline", "open_pipeline"]


@asynccontextmanager
async def new_pipeline(
    manifest: Manifest, trust: Trust, options: PipelineOptions, progress: Progress
) -> AsyncIterator[Pipeline]:
    """A pipeline that is not connected yet. Raises InputError when its results cannot arrive."""
    last = manifest.stages[-1].stage_idx
    listen_at = options.data_out_listen or manifest.endpoint(last).data_out.to_endpoint()
    spec = manifest.activation_spec
    limits = SessionLimits(
        num_slots=options.limits.num_slots,
        max_seq_len=options.limits.max_seq_len,
        max_step_tokens=options.limits.max_step_tokens,
        hidden_dim=spec.hidden_dim,
        activation_dtype=ACTIVATION_DTYPES[spec.dtype],
    )
    try:
        listener = listen(listen_at)
    except EndpointError as error:
        raise InputError(f"cannot listen for the last stage's results: {error}") from error
    connector = Connector(manifest, trust, limits, progress)
    with listener:
        async with AsyncExitStack() as closing:
            async with open_tasks() as tasks:
                pipeline = Pipeline(manifest, options, connector, listener, tasks)
                closing.push_async_callback(pipeline.aclose)
                yield pipeline
                tasks.cancel_scope.cancel()
            await pipeline.say_goodbye()


@asynccontextmanager
async def open_pipeline(
    manifest: Manifest, trust: Trust, options: PipelineOptions, progress: Progress
) -> AsyncIterator[Pipeline]:
    """Connect every stage of `manifest`, verify what it runs, and yield the working pipeline.

    Raises SessionError or StageLost naming the stage that is missing, refused or lost; while the
    body runs, the loss of any stage is raised in it.
    """
    async with new_pipeline(manifest, trust, options, progress) as pipeline:
        try:
            with trio.move_on_after(options.connect_seconds) as deadline:
                await pipeline.connect()
            if deadline.cancelled_caught:
                raise SessionError(
                    f"gave up after {options.connect_seconds:g} s: {pipeline.waiting_for}"
                )
            async with pipeline.unbroken():
                yield pipeline
        except SessionError as error:
            raise await pipeline.explain(error) from error.__cause__
