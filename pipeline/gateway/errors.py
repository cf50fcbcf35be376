"""What goes wrong, in the shape OpenAI clients understand; each door says it in its own way."""

from enum import Enum, auto
from typing import Any

from pipeline.errors import (
    BudgetSpent,
    InputError,
    PipelineError,
    RequestFailed,
    RequestTimedOut,
    ServerLeaving,
    SessionInUse,
)

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class Kind(Enum):
    """Whose fault it is and what helps: what a door's own status is chosen by."""

    INVALID = auto()  # the request cannot be served as it is
    NO_KEY = auto()
    FORBIDDEN = auto()
    NOT_FOUND = auto()
    NOT_ALLOWED = auto()  # there, but not to be used so
    IN_USE = auto()  # by another request: later
    TOO_SLOW = auto()
    TOO_LARGE = auto()
    TOO_MANY = auto()  # of this client: later
    BUSY = auto()  # of all clients together: later
    UNAVAILABLE = auto()
    FAILED = auto()


class ApiError(Exception):
    """An error the client is told of; `param` names the field that is wrong.

    `retry_seconds`: when to come back, if that helps.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = INVALID_REQUEST,  # noqa: A002  (the field's name on the wire)
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.code = code
        self.param = param
        self.type = type
        self.retry_seconds = retry_seconds

    def to_json(self) -> dict[str, Any]:
        """The error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """The request cannot be served as it is."""
    return ApiError(Kind.INVALID, message, code=code, param=param)


def unsupported(param: str, why: str = "is not supported by this server") -> ApiError:
    """The request asks for something whose effect would be missed."""
    return invalid(f"'{param}' {why}.", param, "unsupported_parameter")


def unknown_model(model: str) -> ApiError:
    """The request names a model this server does not have."""
    message = f"The model `{model[:200]}` does not exist; GET /v1/models lists what does."
    return ApiError(Kind.NOT_FOUND, message, code="model_not_found", param="model")


def too_long(size: str, room: int, param: str) -> ApiError:
    """The prompt, of this `size`, leaves no room for even one token."""
    message = (
        f"This model's maximum context length is {room} tokens and the prompt has {size}; "
        f"shorten it to at most {room - 1}."
    )
    return invalid(message, param, "context_length_exceeded")


def busy(message: str) -> ApiError:
    """There is no room for this request now."""
    return ApiError(Kind.BUSY, message, code="server_busy", type=SERVER_ERROR, retry_seconds=1)


def from_pipeline(error: PipelineError) -> ApiError:
    """What a client may know of a failure behind the gateway: its own mistakes, no more."""
    if isinstance(error, SessionInUse):
        return ApiError(Kind.IN_USE, str(error), code="session_in_use", param="session")
    if isinstance(error, InputError):
        return invalid(str(error), None)
    if isinstance(error, RequestFailed):
        return _failed(error)
    if isinstance(error, ServerLeaving):
        return leaving()
    return unavailable("The pipeline lost a stage or its connection; try again.", 1)


def _failed(error: RequestFailed) -> ApiError:
    """One request has failed, and others are served."""
    if isinstance(error, BudgetSpent):
        return ApiError(Kind.FAILED, str(error), code="budget_spent", type=SERVER_ERROR)
    if isinstance(error, RequestTimedOut):
        text = f"{error} (--request-timeout of this server)."
        return ApiError(Kind.TOO_SLOW, text, code="request_timeout", type=SERVER_ERROR)
    return ApiError(Kind.FAILED, "This request failed; others are served.", type=SERVER_ERROR)


def unavailable(message: str, retry_seconds: int) -> ApiError:
    """Nothing can be computed now."""
    return ApiError(
        Kind.UNAVAILABLE,
        message,
        code="pipeline_unavailable",
        type=SERVER_ERROR,
        retry_seconds=retry_seconds,
    )


def leaving() -> ApiError:
    """The server has been told to stop."""
    return ApiError(
        Kind.UNAVAILABLE,
        "The server is stopping; try again.",
        code="server_stopping",
        type=SERVER_ERROR,
        retry_seconds=1,
    )


def internal() -> ApiError:
    """A defect of the server; says nothing else, since nobody knows what it would reveal."""
    return ApiError(Kind.FAILED, "The server failed to handle the request.", type=SERVER_ERROR)
