"""The service of the older proto, `infemeral.TensorInference`, as an ASGI application."""

import logging
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from typing import Any
from urllib.parse import quote

import trio

from pipeline.doors.call import MAX_MESSAGE_BYTES, BodyBudget, Call, Receive, Send
from pipeline.doors.faults import GRPC_STATUSES, GrpcStatus
from pipeline.doors.messages import AttestResponse, Door, DoorError, DoorFault, Payload
from pipeline.doors.protobuf import (
    decode_attest_request_untrusted,
    decode_infer_request_untrusted,
    encode,
)

logger = logging.getLogger(__name__)

SERVICE = "/infemeral.TensorInference/"
FAULT_TRAILER = "veilpipe-fault"
KEY_TRAILER = "veilpipe-key-bin"
# Other clients refuse metadata above 8 KiB; one whose key does not fit asks `Attest` for it.
_MAX_KEY_BYTES = 6 << 10
PREFIX = Struct(">BI")  # whether the message is compressed, and its size
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")
_HEADERS = {"content-type": "application/grpc", "grpc-accept-encoding": "identity"}
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a call ends: an answer's parts, or a status with its reason."""

    parts: list[Payload] = field(default_factory=list)
    status: GrpcStatus = GrpcStatus.OK
    message: str = ""
    more: Mapping[str, str] = field(default_factory=dict)


class GrpcApp:
    """Answers unary calls; each has its own task, and its client's deadline."""

    def __init__(self, door: Door, budget: BodyBudget) -> None:
        self._door = door
        self._budget = budget

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one call."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] == "http":
            max_bytes = MAX_MESSAGE_BYTES + PREFIX.size
            call = Call(scope, receive, send, budget=self._budget, max_bytes=max_bytes)
            await call.run(self._respond)

    async def _respond(self, call: Call) -> None:
        content_type = call.headers.get(b"content-type", b"")
        if call.method != "POST" or not re.match(rb"application/grpc(\+proto|;|$)", content_type):
            await call.answer(415, {"content-type": "text/plain"}, [b"this port speaks gRPC\n"])
            return
        outcome = await self._outcome(call)
        logger.debug("event=door_call via=grpc status=%s", outcome.status.name)
        trailers = {"grpc-status": str(int(outcome.status)), **outcome.more}
        if outcome.message:
            trailers["grpc-message"] = quote(outcome.message, safe=_PRINTABLE)
        num_bytes = sum(map(len, outcome.parts))
        prefix = [] if outcome.status else [PREFIX.pack(0, num_bytes)]
        await call.answer(200, _HEADERS, [*prefix, *outcome.parts], trailers)

    async def _outcome(self, call: Call) -> _Outcome:
        try:
            with trio.move_on_after(_timeout_seconds(call.headers.get(b"grpc-timeout"))):
                return await self._answer(call)
        except DoorError as error:
            return _refusal(error)
        return _Outcome(status=GrpcStatus.DEADLINE_EXCEEDED, message="the call's deadline is over")

    async def _answer(self, call: Call) -> _Outcome:
        match call.path.removeprefix(SERVICE) if call.path.startswith(SERVICE) else "":
            case "Infer":
                request = decode_infer_request_untrusted(await _read_message(call))
                return _Outcome(encode(await self._door.infer(request)))
            case "Attest":
                asked = decode_attest_request_untrusted(await _read_message(call))
                return _Outcome(encode(await self._door.attest(asked)))
        return _Outcome(status=GrpcStatus.UNIMPLEMENTED, message="there is no such method")


class _Compressed(DoorError):
    """A message is compressed, which has no status of its own among the faults."""


async def _read_message(call: Call) -> memoryview:
    """The only message of a call. Raises DoorError, as soon as its first bytes tell."""
    head = await call.read(PREFIX.size)
    if len(head) < PREFIX.size:
        raise DoorError(DoorFault.INVALID, "the call ended without a message")
    is_compressed, num_bytes = PREFIX.unpack(head[: PREFIX.size])
    if is_compressed:
        raise _Compressed(DoorFault.INVALID, "compressed messages are not accepted; use identity")
    if num_bytes > MAX_MESSAGE_BYTES:
        raise DoorError(
            DoorFault.TOO_LARGE,
            f"the message has {num_bytes} bytes; a door takes {MAX_MESSAGE_BYTES}",
        )
    body = await call.read()
    if len(body) != PREFIX.size + num_bytes:
        raise DoorError(DoorFault.INVALID, "the call has more or less than one message")
    return body[PREFIX.size :]


def _refusal(error: DoorError) -> _Outcome:
    status = GRPC_STATUSES[error.fault]
    if isinstance(error, _Compressed):
        status = GrpcStatus.UNIMPLEMENTED
    more = {FAULT_TRAILER: error.fault.value}
    if error.key is not None and (key := _key_text(error.key)) is not None:
        more[KEY_TRAILER] = key
    return _Outcome(status=status, message=str(error), more=more)


def _key_text(key: AttestResponse) -> str | None:
    encoded = b"".join(encode(key))
    if len(encoded) > _MAX_KEY_BYTES:
        return None
    return b64encode(encoded).decode().rstrip("=")


def _timeout_seconds(text: bytes | None) -> float:
    """The deadline that a client sends. Raises DoorError if it is none."""
    if text is None:
        return float("inf")
    if not re.fullmatch(rb"[0-9]{1,8}[HMSmun]", text):
        raise DoorError(DoorFault.INVALID, "grpc-timeout is no time")
    return int(text[:-1]) * _UNITS[chr(text[-1])]
