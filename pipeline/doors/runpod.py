"""A door as a serverless worker of RunPod: `python -m pipeline.doors.runpod --model-dir SHARD`.

The service's SDK runs jobs in asyncio and reads its own flags, `--rp_serve_api` and `--test_input`
among them; the door runs under trio in a thread of its own, and a job waits for it in another.
"""

import argparse
import asyncio
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from pipeline.doors.guarded import GuardedDoor
from pipeline.doors.jobs import ask
from pipeline.doors.json_messages import error_fields, input_from_untrusted, response_fields
from pipeline.doors.messages import Door, DoorError
from pipeline.doors.served_shard import NUM_SESSIONS, ShardOptions, load_door, open_served
from pipeline.errors import PipelineError
from transport.errors import TransportError

Handler = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


async def answer_job(door: Door, job: Mapping[str, Any]) -> dict[str, Any]:
    """What the SDK sends back for a job: its output, or an `error` as text, which fails it."""
    try:
        return response_fields(await ask(door, input_from_untrusted(job.get("input"))))
    except DoorError as error:
        return {"error": json.dumps(error_fields(error))}


def start_door(open_door: Callable[[], AbstractAsyncContextManager[Door]]) -> Handler:
    """Open a door in a thread of its own; the SDK's handler for its jobs. Raises what opening does.

    The thread lasts as long as the process, which the service ends when it likes.
    """
    opened: Future[tuple[trio.lowlevel.TrioToken, GuardedDoor]] = Future()

    async def hold() -> None:
        async with open_door() as door:
            opened.set_result((trio.lowlevel.current_trio_token(), GuardedDoor(door)))
            await trio.sleep_forever()

    def run() -> None:
        try:
            trio.run(hold)
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    threading.Thread(target=run, name="door", daemon=True).start()
    token, door = opened.result()

    async def handler(job: Mapping[str, Any]) -> dict[str, Any]:
        def wait() -> dict[str, Any]:
            return trio.from_thread.run(answer_job, door, job, trio_token=token)

        return await asyncio.to_thread(wait)

    return handler


def parse_options(arguments: Sequence[str], environ: Mapping[str, str]) -> ShardOptions:
    """The door's own flags; the SDK's are let through. Variables say what no flag does."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.doors.runpod",
        description="Serve a client-split shard as a serverless worker of RunPod.",
        epilog="Further flags are the SDK's: --rp_serve_api, --rp_api_port, --test_input, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--model-dir", type=Path, default=environ.get("VEILPIPE_MODEL_DIR"))
    parser.add_argument("--manifest", type=Path, default=environ.get("VEILPIPE_MANIFEST"))
    parser.add_argument("--kv-store", default=environ.get("VEILPIPE_KV_STORE"))
    parser.add_argument("--max-sessions", type=int, default=NUM_SESSIONS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--ignore-measurements", action="store_true")
    found, _ = parser.parse_known_args(arguments)
    if found.model_dir is None:
        parser.error("--model-dir or VEILPIPE_MODEL_DIR: which shard is served")
    if found.ignore_measurements and not found.dev:
        parser.error("--ignore-measurements goes with --dev; without it they are compared")
    return ShardOptions(
        model_dir=Path(found.model_dir),
        manifest=None if found.manifest is None else Path(found.manifest),
        is_dev=found.dev,
        ignores_measurements=found.ignore_measurements,
        num_sessions=found.max_sessions,
        threads=max(1, found.threads),
        kv_store=found.kv_store,
    )


def main() -> None:
    """Serve jobs until the service ends this process."""
    import runpod  # noqa: PLC0415  (a dependency of this worker's image alone)

    options = parse_options(sys.argv[1:], os.environ)
    try:
        setup = load_door(options)
        handler = start_door(partial(open_served, setup, options))
    except (PipelineError, TransportError) as error:
        sys.stderr.write(f"pipeline.doors.runpod: error: {error}\n")
        sys.exit(getattr(error, "exit_code", 1))
    runpod.serverless.start({"handler": handler})


if __name__ == "__main__":
    main()
