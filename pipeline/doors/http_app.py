"""The older HTTP handler's event, `{"input": {…}}`, as an ASGI application."""

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import trio

from pipeline.doors.call import MAX_MESSAGE_BYTES, BodyBudget, Call, Receive, Send
from pipeline.doors.faults import HTTP_STATUSES
from pipeline.doors.jobs import Jobs, ask, new_id
from pipeline.doors.json_messages import (
    attest_request_from_untrusted,
    error_fields,
    event_from_untrusted,
    response_fields,
)
from pipeline.doors.messages import AttestResponse, Door, DoorError, DoorFault, InferResponse

logger = logging.getLogger(__name__)

# What carries a message of the largest size in base64, and the names around it.
MAX_BODY_BYTES = -(-MAX_MESSAGE_BYTES // 3) * 4 + (64 << 10)
_MAX_QUEUED_BYTES = 10 << 20  # of /run, as the service that it is modelled on has it
_MAX_ATTEST_BYTES = 4 << 10
_SMALL_BYTES = 64 << 10  # is read and written in less time than another thread needs to start

_Result = TypeVar("_Result")
_STATUS = "/status/"
_LIMITS = {
    "/runsync": MAX_BODY_BYTES, "/run": _MAX_QUEUED_BYTES, "/attest": _MAX_ATTEST_BYTES,
}  # fmt: skip


class HttpApp:
    """Answers each request with JSON, be it what was asked for or why not."""

    def __init__(self, door: Door, budget: BodyBudget) -> None:
        self._door = door
        self._budget = budget
        self._jobs = Jobs(door)

    async def run_jobs(self) -> None:
        """Run what /run is asked for, until cancelled."""
        await self._jobs.run()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] == "http":
            limit = _LIMITS.get(scope["path"], 0)
            call = Call(scope, receive, send, budget=self._budget, max_bytes=limit)
            await call.run(self._respond)

    async def _respond(self, call: Call) -> None:
        headers = {"content-type": "application/json"}
        problem = self._problem(call)
        if problem is not None:
            status, message, more = problem
            headers |= more
            body = _to_json({"error": {"message": message}})
        else:
            try:
                status, body = 200, await self._answer(call)
            except DoorError as error:
                status = HTTP_STATUSES[error.fault]
                body = _to_json({"id": new_id(), "status": "FAILED", "error": error_fields(error)})
        if status in {429, 503}:
            headers["retry-after"] = "1"
        logger.debug("event=door_call via=http status=%d", status)
        headers["content-length"] = str(len(body))
        await call.answer(status, headers, [body])

    def _problem(self, call: Call) -> tuple[int, str, dict[str, str]] | None:
        """What is wrong with a request's head: a status, the reason and further headers."""
        is_status = call.path.startswith(_STATUS)
        if is_status and call.path.removeprefix(_STATUS) not in self._jobs:
            return 404, "there is no such job, or no more", {}
        if not is_status and call.path not in _LIMITS:
            return 404, "there is no such route", {}
        allowed = ["GET", "POST"] if is_status else ["POST"]
        if call.method not in allowed:
            return 405, f"the method should be {allowed[0]}", {"allow": ", ".join(allowed)}
        # Attack: a web page may send other types to any server without asking it first.
        content_type = call.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if not is_status and content_type != b"application/json":
            return 415, "the content type should be application/json", {}
        return None

    async def _answer(self, call: Call) -> bytes:
        if call.path.startswith(_STATUS):
            return _to_json(self._jobs.view(call.path.removeprefix(_STATUS)))
        _check_length(call)
        body = await call.read()
        if call.path == "/attest":
            return _to_json(
                response_fields(await self._door.attest(attest_request_from_untrusted(body)))
            )
        request = await _off_thread(partial(event_from_untrusted, body), len(body))
        if call.path == "/run":
            return _to_json(self._jobs.submit(request))
        response = await ask(self._door, request)
        size = len(response.output) if isinstance(response, InferResponse) else 0
        return await _off_thread(partial(_completed, response), size)


def _check_length(call: Call) -> None:
    """Raise DoorError if the head says already that the body is too large."""
    declared = int(call.headers.get(b"content-length", 0))  # the server has checked it
    if declared > _LIMITS[call.path]:
        raise DoorError(
            DoorFault.TOO_LARGE,
            f"the body has {declared} bytes; {call.path} takes {_LIMITS[call.path]}",
        )


async def _off_thread(work: Callable[[], _Result], size: int) -> _Result:
    """Do it here, or in another thread if it takes long enough for others to wait."""
    if size <= _SMALL_BYTES:
        return work()
    return await trio.to_thread.run_sync(work)


def _completed(response: InferResponse | AttestResponse) -> bytes:
    return _to_json({"id": new_id(), "status": "COMPLETED", "output": response_fields(response)})


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
