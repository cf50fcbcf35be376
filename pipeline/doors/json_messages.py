"""The older handler's event and answer, as JSON with base64."""

import json
from base64 import b64encode
from binascii import Error as BinasciiError
from binascii import a2b_base64
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.doors.faults import fault_named
from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    DoorError,
    DoorFault,
    InferRequest,
    InferResponse,
    Payload,
)

_MAX_DIMS = 16  # no tensor has more
_INT64 = 1 << 63
_INT32 = 1 << 31
_MAX_TEXT = 4096
_MAX_NAME = 80  # of a field that somebody made up


def _from_base64(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("should be base64 text")
    try:
        return a2b_base64(value, strict_mode=True)
    except (BinasciiError, ValueError):
        raise ValueError("should be base64") from None


_Schema = TypeVar("_Schema", bound=BaseModel)
_Base64 = Annotated[bytes, BeforeValidator(_from_base64)]
_Dim = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
_Text = Annotated[str, Field(max_length=_MAX_TEXT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Attest(_Strict):
    nonce: _Base64


class _AttestInput(_Strict):
    attest: _Attest


class _InferInput(_Strict):
    cloaked_embedding: _Base64
    encrypted_session_key: _Base64
    nonce: _Base64
    shape: Annotated[list[_Dim], Field(max_length=_MAX_DIMS)]
    dtype: _Text
    session_id: _Text
    max_new_tokens: Annotated[int, Field(ge=-_INT32, lt=_INT32)] = 0
    temperature: float = 0.0


class _Output(_Strict):
    output: _Base64
    nonce: _Base64
    shape: Annotated[list[_Dim], Field(max_length=_MAX_DIMS)]
    dtype: _Text
    tokens_processed: Annotated[int, Field(ge=-_INT32, lt=_INT32)]


class _Key(_Strict):
    public_key: _Base64
    core_hash: _Base64
    evidence_kind: _Text
    evidence: _Base64


def event_from_untrusted(body: Payload) -> InferRequest | AttestRequest:
    """What the event of such a body asks. Raises DoorError."""
    fields = parse_untrusted(body)
    if not isinstance(fields, dict) or fields.keys() != {"input"}:
        raise DoorError(DoorFault.INVALID, 'the body should be {"input": {…}} and nothing more')
    return input_from_untrusted(fields["input"])


def input_from_untrusted(fields: object) -> InferRequest | AttestRequest:
    """What an event's `input` asks. Raises DoorError."""
    if isinstance(fields, dict) and "attest" in fields:
        return AttestRequest(_check(_AttestInput, fields).attest.nonce)
    return InferRequest(**dict(_check(_InferInput, fields)))


def attest_request_from_untrusted(body: Payload) -> AttestRequest:
    """What the body of /attest asks. Raises DoorError."""
    return AttestRequest(_check(_Attest, parse_untrusted(body)).nonce)


def infer_response_from_untrusted(fields: object) -> InferResponse:
    """A door's answer to a step. Raises DoorError."""
    return InferResponse(**dict(_check(_Output, fields)))


def attest_response_from_untrusted(fields: object) -> AttestResponse:
    """A door's evidence. Raises DoorError."""
    return AttestResponse(**dict(_check(_Key, fields)))


def error_from_untrusted(error: object) -> DoorError | None:
    """The refusal that a door's `error` is, be it an object or its text; None if it is none."""
    if isinstance(error, str):
        try:
            error = parse_untrusted(error)
        except DoorError:
            return None
    fields = error if isinstance(error, dict) else {}
    fault = fault_named(fields.get("fault"))
    if fault is None:
        return None
    key = fields.get("key")
    return DoorError(
        fault,
        str(fields.get("message", "")),
        None if key is None else attest_response_from_untrusted(key),
    )


def request_fields(request: InferRequest | AttestRequest) -> dict[str, Any]:
    """The `input` of an event that asks this."""
    if isinstance(request, AttestRequest):
        return {"attest": {"nonce": _text(request.nonce)}}
    return {
        "cloaked_embedding": _text(request.cloaked_embedding),
        "encrypted_session_key": _text(request.encrypted_session_key),
        "nonce": _text(request.nonce),
        "shape": list(request.shape),
        "dtype": request.dtype,
        "session_id": request.session_id,
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
    }


def response_fields(response: InferResponse | AttestResponse) -> dict[str, Any]:
    """The `output` of a job that ends with this."""
    if isinstance(response, AttestResponse):
        return {
            "public_key": _text(response.public_key),
            "core_hash": _text(response.core_hash),
            "evidence_kind": response.evidence_kind,
            "evidence": _text(response.evidence),
        }
    return {
        "output": _text(response.output),
        "nonce": _text(response.nonce),
        "shape": list(response.shape),
        "dtype": response.dtype,
        "tokens_processed": response.tokens_processed,
    }


def error_fields(error: DoorError) -> dict[str, Any]:
    """A refusal as JSON has it."""
    key = {} if error.key is None else {"key": response_fields(error.key)}
    return {"fault": error.fault.value, "message": str(error), **key}


def parse_untrusted(text: Payload | str) -> object:
    """Any JSON there is. Raises DoorError, also for what Python reads beyond JSON, or cannot."""
    try:
        if not isinstance(text, str):
            text = str(text, "utf-8")
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # of UTF-8, of JSON, of an integer's length, of depth
        raise DoorError(DoorFault.INVALID, "the body is not JSON that a door reads") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check(schema: type[_Schema], fields: object) -> _Schema:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:_MAX_NAME] or "input"
        raise DoorError(DoorFault.INVALID, f"{where}: {first['msg']}") from None


def _text(payload: Payload) -> str:
    return b64encode(payload).decode()
