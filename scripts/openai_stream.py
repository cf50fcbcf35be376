"""A client of OpenAI-compatible servers that costs little beside what it measures: h11 on trio."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import h11
import trio

from pipeline.errors import InputError

CHUNK_BYTES = 1 << 16
MAX_BODY_BYTES = 1 << 20
MAX_EVENT_BYTES = 1 << 20


class BenchError(InputError):
    """Nothing can be measured; one line says why."""


class RequestFailed(Exception):
    """One request had no whole answer; the text is the kind of failure."""


def one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


@dataclass(frozen=True, slots=True)
class Server:
    """Where the API is, and how to reach it."""

    url: str
    host: str
    port: int
    is_secure: bool
    path: str
    key: str | None

    @classmethod
    def parse(cls, url: str, key_file: Path | None) -> "Server":
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BenchError(f"--url {url}: {error}") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BenchError(f"--url {url}: give an address like http://127.0.0.1:8000")
        is_secure = parts.scheme == "https"
        path = parts.path.rstrip("/")
        return cls(
            url=url,
            host=parts.hostname,
            port=port or (443 if is_secure else 80),
            is_secure=is_secure,
            path=path if path.endswith("/v1") else f"{path}/v1",
            key=None if key_file is None else _read_key(key_file),
        )

    async def open(self) -> trio.abc.Stream:
        if self.is_secure:
            return await trio.open_ssl_over_tcp_stream(self.host, self.port, https_compatible=True)
        return await trio.open_tcp_stream(self.host, self.port)

    def head(self, method: str, path: str, length: int) -> h11.Request:
        headers = [("host", f"{self.host}:{self.port}"), ("connection", "close")]
        if length:
            headers += [("content-type", "application/json"), ("content-length", str(length))]
        if self.key:
            headers.append(("authorization", f"Bearer {self.key}"))
        return h11.Request(method=method, target=self.path + path, headers=headers)


def _read_key(path: Path) -> str:
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {one_line(error)}") from error
    if not words:
        raise BenchError(f"{path} holds no key")
    return words[0]


class Answer:
    """A response on its way."""

    def __init__(self, http: h11.Connection, stream: trio.abc.Stream) -> None:
        self._http = http
        self._stream = stream
        self.status = 0

    async def head(self) -> None:
        """Wait for the status."""
        event = await self._next()
        while isinstance(event, h11.InformationalResponse):
            event = await self._next()
        if not isinstance(event, h11.Response):
            raise RequestFailed("no HTTP answer")
        self.status = event.status_code

    async def chunk(self) -> bytes:
        """More of the body; nothing at its end."""
        event = await self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def body(self) -> bytes:
        data = b""
        while len(data) < MAX_BODY_BYTES and (more := await self.chunk()):
            data += more
        return data

    async def _next(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._stream.receive_some(CHUNK_BYTES))
        return event


@asynccontextmanager
async def ask(server: Server, method: str, path: str, body: bytes = b"") -> AsyncIterator[Answer]:
    """Send one request on a connection of its own. Raises RequestFailed, in the body as well."""
    try:
        async with await server.open() as stream:
            http = h11.Connection(h11.CLIENT)
            data = http.send(server.head(method, path, len(body)))
            if body:
                data += http.send(h11.Data(data=body))
            await stream.send_all(data + http.send(h11.EndOfMessage()))
            answer = Answer(http, stream)
            await answer.head()
            yield answer
    except h11.ProtocolError as error:
        raise RequestFailed("no whole HTTP answer") from error
    except (OSError, trio.BrokenResourceError) as error:
        raise RequestFailed(f"connection: {one_line(error.__cause__ or error)}") from error


async def find_model(server: Server) -> str:
    """The first model the server has. Raises BenchError."""
    try:
        with trio.fail_after(10):
            async with ask(server, "GET", "/models") as answer:
                status, body = answer.status, await answer.body()
    except (RequestFailed, trio.TooSlowError) as error:
        raise BenchError(f"no answer from {server.url}: {one_line(error)}") from error
    if status in {401, 403}:
        raise BenchError(f"{server.url} refuses us ({status}): give a key with --api-key-file")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise BenchError(f"{server.url} answers {status} to /v1/models, with no model") from error


class EventStream:
    """The JSON objects of server-sent events."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._buffer = b""

    async def next(self) -> dict | None:
        """The next one, None after [DONE]. Raises RequestFailed."""
        while True:
            line = await self._line()
            if line.startswith(b"data:"):
                data = line[5:].strip()
                return None if data == b"[DONE]" else _event(data)

    async def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            more = await self._answer.chunk()
            if not more:
                raise RequestFailed("the stream ended before [DONE]")
            self._buffer += more
            if len(self._buffer) > MAX_EVENT_BYTES:
                raise RequestFailed("an event without end")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


@asynccontextmanager
async def stream(server: Server, path: str, body: dict) -> AsyncIterator[EventStream]:
    """Ask for a stream of events. Raises RequestFailed."""
    async with ask(server, "POST", path, json.dumps(body).encode()) as answer:
        if answer.status != 200:
            raise RequestFailed(f"HTTP {answer.status}{_error_code(await answer.body())}")
        yield EventStream(answer)


def _event(data: bytes) -> dict:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestFailed("an event that is not JSON") from error
    if not isinstance(event, dict):
        raise RequestFailed("an event that is no object")
    if event.get("error"):
        raise RequestFailed(f"error event{_error_code(data)}")
    return event


def _error_code(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return f" {error.get('code') or error.get('type')}"[:80]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ""
