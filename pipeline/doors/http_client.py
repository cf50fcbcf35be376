"""A door behind HTTP, be it its own or a serverless endpoint, as its client has it."""

import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import trio

from pipeline.doors.http_app import MAX_BODY_BYTES
from pipeline.doors.json_messages import (
    attest_response_from_untrusted,
    error_from_untrusted,
    infer_response_from_untrusted,
    parse_untrusted,
    request_fields,
)
from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    DoorError,
    DoorFault,
    InferRequest,
    InferResponse,
)
from pipeline.doors.peer import brief, reading_answers_of, unreachable
from pipeline.errors import InputError, SessionError

RUNPOD_BODY_BYTES = 20_000_000  # of its /runsync
_SMALL_FIELDS_BYTES = 64 << 10  # room for a request's other fields beside the embedding
_WAITING = {"IN_QUEUE", "IN_PROGRESS"}
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.1, 2.0
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class HttpDoor:
    """Each call is a job at /runsync, whose status is polled where it takes longer.

    Raises of its calls: DoorError where the door refuses, SessionError where it is not reached or
    answers something else; whether to try again is the caller's to know.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, max_event_bytes: int) -> None:
        self._client = client
        self._url = url.rstrip("/")
        self._name = f"the door at {self._url}"
        self._max_event_bytes = max_event_bytes
        self.max_body_bytes = (max_event_bytes - _SMALL_FIELDS_BYTES) // 4 * 3

    async def infer(self, request: InferRequest) -> InferResponse:
        """Run one step of a session."""
        output = await self._run(request)
        with reading_answers_of(self._name):
            return infer_response_from_untrusted(output)

    async def attest(self, request: AttestRequest) -> AttestResponse:
        """Show which key to seal to."""
        output = await self._run(request)
        with reading_answers_of(self._name):
            return attest_response_from_untrusted(output)

    async def _run(self, request: InferRequest | AttestRequest) -> object:
        event = json.dumps({"input": request_fields(request)}, separators=(",", ":")).encode()
        if len(event) > self._max_event_bytes:
            raise DoorError(
                DoorFault.TOO_LARGE,
                f"a request of {len(event)} bytes; {self._name} takes {self._max_event_bytes}",
            )
        job = await self._exchange("POST", "/runsync", event)
        delay = _FIRST_POLL_SECONDS
        while job.get("status") in _WAITING:
            name = job.get("id")
            if not isinstance(name, str) or not _JOB_ID.fullmatch(name):
                raise SessionError(f"{self._name} runs a job without a usable id")
            await trio.sleep(delay)
            delay = min(2 * delay, _LAST_POLL_SECONDS)
            job = await self._exchange("GET", f"/status/{name}")
        if job.get("status") == "COMPLETED":
            return job.get("output")
        raise self._failure(job, f"the job ended as {brief(job.get('status'))}")

    def _failure(self, job: Mapping[str, Any], otherwise: str) -> DoorError | SessionError:
        with reading_answers_of(self._name):
            refusal = error_from_untrusted(job.get("error"))
        return refusal or SessionError(f"{self._name}: {otherwise}")

    async def _exchange(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """What a job has become, by the door's answer. Raises DoorError, SessionError."""
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            async with self._client.stream(
                method, self._url + path, content=body, headers=headers
            ) as response:
                text = await self._read(response)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise unreachable(self._name, error) from error
        if response.status_code in {401, 403} and not text.startswith(b"{"):
            raise SessionError(f"{self._name} refuses the key ({response.status_code})")
        job: object = None
        try:
            job = parse_untrusted(text)
        except DoorError as error:
            if response.is_success:
                raise SessionError(f"{self._name} answers what is not JSON") from error
        fields = job if isinstance(job, dict) else {}
        if not response.is_success or not isinstance(job, dict):
            raise self._failure(fields, f"it answers HTTP {response.status_code}")
        return fields

    async def _read(self, response: httpx.Response) -> bytearray:
        text = bytearray()
        async for chunk in response.aiter_raw():
            text += chunk
            if len(text) > MAX_BODY_BYTES:
                raise SessionError(f"{self._name} answers more than {MAX_BODY_BYTES} bytes")
        return text


@asynccontextmanager
async def open_http_door(
    url: str, tls: ssl.SSLContext, bearer_key: str | None, max_event_bytes: int = MAX_BODY_BYTES
) -> AsyncIterator[HttpDoor]:
    """The door at that URL; its calls share connections, and know no time limit but the caller's.

    Raises InputError for a key that no header can carry.
    """
    # Attack: an answer of a few bytes that unpacks to all the memory there is.
    headers = {"accept-encoding": "identity", "user-agent": "veilpipe"}
    if bearer_key is not None:
        if not re.fullmatch(r"[\x21-\x7e]+", bearer_key):
            raise InputError("the door's key has characters that no header can carry")
        headers["authorization"] = f"Bearer {bearer_key}"
    # How long a call may take is said by the caller's cancel scope.
    client = httpx.AsyncClient(verify=tls, timeout=None, headers=headers)  # noqa: S113
    async with client:
        yield HttpDoor(client, url, max_event_bytes)
