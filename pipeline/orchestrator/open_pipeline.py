"""The orchestrator: opens a pipeline on the user's side and closes it again."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

from pipeline.agreement.addresses import FETCHES
from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import Trust
from pipeline.errors import InputError, SessionError
from pipeline.orchestrator.connect_deadline import Patience
from pipeline.orchestrator.connector import Connector, Progress
from pipeline.orchestrator.remote_pipeline import Pipeline, PipelineOptions
from pipeline.placement.base import Placement
from pipeline.placement.by_hand import ByHand
from pipeline.tasks import open_tasks
from transport.dial_and_listen import listen
from transport.errors import EndpointError

__all__ = ["Pipeline", "PipelineOptions", "new_pipeline", "open_pipeline"]


@asynccontextmanager
async def new_pipeline(
    manifest: Manifest,
    trust: Trust,
    options: PipelineOptions,
    progress: Progress,
    placement: Placement | None = None,
) -> AsyncIterator[Pipeline]:
    """A pipeline that is not connected yet; without a placement, at the manifest's addresses.

    Raises InputError when its results cannot arrive, or the ends of the model are not where the
    manifest says.
    """
    if options.ends.are_remote is manifest.has_client_ends:
        raise InputError(
            f"the manifest's split is {manifest.split}, and embedding and head are "
            f"{'not ' if options.ends.are_remote else ''}held here"
        )
    placement = placement or ByHand(manifest)
    named = placement.results_at
    if named is None and options.data_out_listen is not None:
        raise InputError(FETCHES)
    listen_at = options.data_out_listen or named
    limits = options.limits.for_session(
        manifest.activation_spec.codec, has_client_ends=manifest.has_client_ends
    )
    try:
        listener = None if listen_at is None else listen(listen_at)
    except EndpointError as error:
        raise InputError(f"cannot listen for the last stage's results: {error}") from error
    connector = Connector(manifest, trust, limits, placement, progress, options.times)
    with listener or nullcontext():
        async with AsyncExitStack() as closing, open_tasks() as tasks:
            pipeline = Pipeline(manifest, options, placement, connector, listener, tasks)
            closing.push_async_callback(pipeline.aclose)
            closing.push_async_callback(pipeline.say_goodbye)  # whatever has ended it
            yield pipeline
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def open_pipeline(
    manifest: Manifest,
    trust: Trust,
    options: PipelineOptions,
    progress: Progress,
    placement: Placement | None = None,
) -> AsyncIterator[Pipeline]:
    """Connect every stage of `manifest`, verify what it runs, and yield the working pipeline.

    Raises SessionError or StageLost naming the stage that is missing, refused or lost; while the
    body runs, the loss of any stage is raised in it.
    """
    async with new_pipeline(manifest, trust, options, progress, placement) as pipeline:
        try:
            patience = Patience(options.times.connect_seconds, lambda: pipeline.progress)
            if not await patience.run(pipeline.connect):
                raise SessionError(
                    f"gave up after {options.times.connect_seconds:g} s: {pipeline.waiting_for}"
                )
            async with pipeline.unbroken():
                yield pipeline
        except SessionError as error:
            raise await pipeline.explain(error) from error.__cause__
