"""What goes wrong, in the shape OpenAI clients understand."""

from collections.abc import Mapping
from typing import Any

from pipeline.errors import InputError, PipelineError, RequestFailed

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class ApiError(Exception):
    """An error the client is told of; `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str = INVALID_REQUEST,  # noqa: A002  (the field's name on the wire)
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type
        self.headers = dict(headers or {})

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
    return ApiError(400, message, code=code, param=param)


def unknown_model(model: str) -> ApiError:
    """The request names a model this server does not have."""
    message = f"The model `{model[:200]}` does not exist; GET /v1/models lists what does."
    return ApiError(404, message, code="model_not_found", param="model")


def too_long(num_tokens: int, room: int, param: str) -> ApiError:
    """The prompt leaves no room for even one token."""
    message = (
        f"This model's maximum context length is {room} tokens and the prompt has {num_tokens}; "
        f"shorten it to at most {room - 1}."
    )
    return invalid(message, param, "context_length_exceeded")


def from_pipeline(error: PipelineError) -> ApiError:
    """What a client may know of a failure behind the gateway: its own mistakes, no more."""
    if isinstance(error, InputError):
        return invalid(str(error), None)
    if isinstance(error, RequestFailed):
        return ApiError(500, "This request failed; others are served.", type=SERVER_ERROR)
    return ApiError(
        503,
        "The pipeline lost a stage or its connection; try again.",
        code="pipeline_unavailable",
        type=SERVER_ERROR,
        headers={"retry-after": "1"},
    )


def internal() -> ApiError:
    """A defect of the server; says nothing else, since nobody knows what it would reveal."""
    return ApiError(500, "The server failed to handle the request.", type=SERVER_ERROR)
