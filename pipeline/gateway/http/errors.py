"""What goes wrong, as a status and headers."""

from collections.abc import Mapping
from http import HTTPStatus

from starlette.responses import JSONResponse

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


def to_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The whole answer to a request that fails; `headers` are sent beside its own."""
    own = dict(headers or {})
    if error.retry_seconds is not None:
        own["retry-after"] = str(error.retry_seconds)
    if error.kind is Kind.NO_KEY:
        own["www-authenticate"] = "Bearer"
    return JSONResponse(error.to_json(), STATUSES[error.kind], headers=own)
