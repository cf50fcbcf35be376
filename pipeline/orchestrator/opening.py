"""The orchestrator: opens a pipeline on the user's side and closes it again."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust import Trust
from pipeline.errors import InputError, SessionError
from pipeline.orchestrator.connector import Connector, Progress
from pipeline.orchestrator.remote_pipeline import Pipeline, PipelineOptions
from pipeline.tasks import open_tasks
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
    limits = options.limits.for_session(manifest.activation_spec.codec)
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
