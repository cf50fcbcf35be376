"""Flags say all of the time limits that users meet; without them they are the usual ones."""

import inspect

from pipeline.cli.pipeline_flags import PipelineFlags
from pipeline.cli.settings import takes_flags
from pipeline.cli.time_flags import StageTimes
from pipeline.cli.worker_flags import WorkerFlags
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from transport.retries import RetryPolicy


def read(role, **given):
    command = takes_flags(role=role)(lambda *, role: role)
    return command(**dict.fromkeys(inspect.signature(command).parameters) | given)


def test_those_of_an_orchestrator():
    assert read(PipelineFlags).times == DEFAULT_TIMES
    told = read(
        PipelineFlags, connect_timeout="7", handshake_timeout="3", hang_timeout="9",
        request_timeout="5", connect_attempts="4",
    ).times  # fmt: skip
    assert told == TimeLimits(
        connect_seconds=7, handshake_seconds=3, idle_seconds=9, request_seconds=5,
        retry=RetryPolicy(attempts=4),
    )  # fmt: skip


def test_those_of_a_stage():
    assert read(StageTimes).limits == DEFAULT_TIMES
    told = read(StageTimes, handshake_timeout="3", init_timeout="4", idle_timeout="5").limits
    assert told == TimeLimits(handshake_seconds=3, init_seconds=4, idle_seconds=5)
    assert WorkerFlags.model_fields["times"].annotation is StageTimes
