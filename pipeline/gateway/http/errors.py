"""What goes wrong, as a status and headers."""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from pipeline.gateway.dialects.messages_events import error_event
from pipeline.gateway.dialects.ollama_lines import error_line
from pipeline.gateway.errors import ApiError, Kind

STATUSES: Mapping[Kind, HTTPStatus] = {
    Kind.INVALID: HTTPStatus.BAD_REQUEST,
    Kind.NO_KEY: HTTPStatus.UNAUTHORIZED,
    Kind.FORBIDDEN: HTTPStatus.FORBIDDEN,
    Kind.NOT_FOUND: HTTPStatus.NOT_FOUND,
    Kind.NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    Kind.IN_USE: HTTPStatus.CONFLICT,
    Kind.TOO_SLOW: HTTPStatus.REQUEST_TIMEOUT,
    Kind.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Kind.TOO_MANY: HTTPStatus.TOO_MANY_REQUESTS,
    Kind.BUSY: HTTPStatus.SERVICE_UNAVAILABLE,
    Kind.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Kind.FAILED: HTTPStatus.INTERNAL_SERVER_ERROR,
}


# By the beginning of a path, how errors are told there.
_SHAPES: Mapping[str, Callable[[ApiError], Mapping[str, Any]]] = {
    "/v1/messages": error_event,
    "/api/": error_line,
}


def to_response(
    error: ApiError, path: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The whole answer to a request that fails; `headers` are sent beside its own."""
    own = dict(headers or {})
    if error.retry_seconds is not None:
        own["retry-after"] = str(error.retry_seconds)
    if error.kind is Kind.NO_KEY:
        own["www-authenticate"] = "Bearer"
    shapes = (shape for start, shape in _SHAPES.items() if path.startswith(start))
    return JSONResponse(next(shapes, ApiError.to_json)(error), STATUSES[error.kind], headers=own)
