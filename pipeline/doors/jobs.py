"""Jobs as serverless endpoints have them: asked for now, looked up until they are done."""

import secrets
from dataclasses import dataclass
from typing import Any

import trio

from pipeline.doors.json_messages import error_fields, response_fields
from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    Door,
    DoorError,
    DoorFault,
    InferRequest,
    InferResponse,
)

_MAX_JOBS = 32  # each holds its request or its answer
_KEEP_SECONDS = 600.0


async def ask(door: Door, request: InferRequest | AttestRequest) -> InferResponse | AttestResponse:
    """Ask a door whichever it is. Raises DoorError."""
    if isinstance(request, AttestRequest):
        return await door.attest(request)
    return await door.infer(request)


def new_id() -> str:
    """A name nobody can guess: whoever knows it may read the job's answer."""
    return secrets.token_hex(16)


@dataclass(slots=True)
class _Job:
    view: dict[str, Any]
    ended: float = float("inf")


class Jobs:
    """The jobs that run, and for a while those that have ended."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._jobs: dict[str, _Job] = {}
        self._news, self._due = trio.open_memory_channel[tuple[_Job, InferRequest | AttestRequest]](
            _MAX_JOBS
        )

    async def run(self) -> None:
        """Run what is asked for, until cancelled."""
        async with trio.open_nursery() as nursery:
            async for job, request in self._due:
                nursery.start_soon(self._run_job, job, request)

    def submit(self, request: InferRequest | AttestRequest) -> dict[str, Any]:
        """Begin a job; what `view` says of it now. Raises DoorError if there are too many."""
        self._forget_old()
        if len(self._jobs) >= _MAX_JOBS:
            raise DoorError(DoorFault.BUSY, "too many jobs wait or have not been fetched")
        job = _Job({"id": new_id(), "status": "IN_QUEUE"})
        self._jobs[job.view["id"]] = job
        self._news.send_nowait((job, request))
        return dict(job.view)

    def __contains__(self, job_id: str) -> bool:
        self._forget_old()
        return job_id in self._jobs

    def view(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return self._jobs[job_id].view

    async def _run_job(self, job: _Job, request: InferRequest | AttestRequest) -> None:
        job.view["status"] = "IN_PROGRESS"
        try:
            job.view |= {"output": response_fields(await ask(self._door, request))}
            job.view["status"] = "COMPLETED"
        except DoorError as error:
            job.view |= {"status": "FAILED", "error": error_fields(error)}
        job.ended = trio.current_time()

    def _forget_old(self) -> None:
        now = trio.current_time()
        self._jobs = {
            name: job for name, job in self._jobs.items() if now - job.ended < _KEEP_SECONDS
        }
