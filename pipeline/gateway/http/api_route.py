"""A route that says what it takes and what it answers, for whoever documents it."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.routing import Route

from pipeline.gateway.http.answer_schemas import ErrorAnswer


class ApiRoute(Route):
    """`body` is the schema its endpoint parses with, `answer` that of what it says in JSON.

    `streams`: the media type of what it answers where asked to stream; `error`: what it says of a
    request that fails; `is_open`: it wants no key.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[[Request], Awaitable[Any]],
        *,
        methods: Sequence[str] = ("GET",),
        body: type[BaseModel] | None = None,
        answer: type[BaseModel] | None = None,
        streams: str | None = None,
        error: type[BaseModel] = ErrorAnswer,
        is_open: bool = False,
    ) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.body = body
        self.answer = answer
        self.streams = streams
        self.error = error
        self.is_open = is_open
