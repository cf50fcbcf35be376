"""A route that says what it takes and what it answers, for whoever documents it."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.routing import Route


class ApiRoute(Route):
    """`body` is the schema its endpoint parses with, `answer` that of what it says in JSON.

    `is_streamed`: it answers with server-sent events where asked to; `is_open`: it wants no key.
    """

    def __init__(
        self,
        path: str,
        endpoint: Callable[[Request], Awaitable[Any]],
        *,
        methods: Sequence[str] = ("GET",),
        body: type[BaseModel] | None = None,
        answer: type[BaseModel] | None = None,
        is_streamed: bool = False,
        is_open: bool = False,
    ) -> None:
        super().__init__(path, endpoint, methods=list(methods))
        self.body = body
        self.answer = answer
        self.is_streamed = is_streamed
        self.is_open = is_open
