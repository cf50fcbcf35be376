"""Messages in texts over HTTP: /v1/stego/encode and /v1/stego/decode.

Secret and message are in the clear here, as prompts are: the server is the user's own.
"""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.errors import SessionError
from pipeline.gateway.chat_messages import Schema
from pipeline.gateway.desk import Desk
from pipeline.gateway.errors import ApiError, Kind, invalid
from pipeline.gateway.http.answer_schemas import StegoMessage, StegoText
from pipeline.gateway.http.api_route import ApiRoute
from pipeline.gateway.http.client_exchange import Exchange
from pipeline.gateway.openai_requests import parse_untrusted
from pipeline.stego.errors import Unreadable
from pipeline.stego.fingerprint import Settings
from pipeline.stego.keys import Secret
from pipeline.stego.message import MAX_MESSAGE_BYTES
from pipeline.stego.secret_files import check_passphrase
from pipeline.stego.service import StegoService, Task
from pipeline.stego.statistics import Statistics

_MAX_BASE64 = 4 * -(-MAX_MESSAGE_BYTES // 3)
_BASE64 = Annotated[str, Field(max_length=_MAX_BASE64)]


class _TripRequest(Schema):
    """What both endpoints share. `secret` is base64; what the text follows is no part of it."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    secret: _BASE64 | None = None
    passphrase: str | None = None
    chat: bool = False
    codec: str = Settings().codec
    temperature: float = Settings().temperature
    top_k: int = Settings().top_k
    top_p: float = Settings().top_p
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None

    def settings(self) -> Settings:
        """How tokens are chosen."""
        names = set(Settings.model_fields)
        return Settings(**self.model_dump(include=names))

    def secrets(self) -> Secret:
        """What both ends know. Raises ApiError, StegoError."""
        passphrase = (self.passphrase or "").encode("utf-8", "surrogatepass")
        if self.passphrase is not None:
            check_passphrase(passphrase)
        return Secret(_decoded(self.secret or "", "secret"), passphrase)


class EncodeRequest(_TripRequest):
    """The body of /v1/stego/encode: a message as text or as base64."""

    message: str | None = None
    message_base64: _BASE64 | None = None
    compress: bool = True

    def content(self) -> bytes:
        """The message. Raises ApiError."""
        if (self.message is None) == (self.message_base64 is None):
            raise invalid("Give either message or message_base64.", "message")
        if self.message is not None:
            return self.message.encode("utf-8", "surrogatepass")
        return _decoded(self.message_base64 or "", "message_base64")


class DecodeRequest(_TripRequest):
    """The body of /v1/stego/decode."""

    text: str


_Body = TypeVar("_Body", bound=_TripRequest)


def stego_routes(desk: Desk, service: Callable[[], StegoService | None]) -> Sequence[Route]:
    """The endpoints; `service` is asked when a request comes and the desk is open."""
    door, post = StegoDoor(desk, service), ["POST"]
    return (
        ApiRoute(
            "/v1/stego/encode", door.encode, methods=post, body=EncodeRequest, answer=StegoText
        ),
        ApiRoute(
            "/v1/stego/decode", door.decode, methods=post, body=DecodeRequest, answer=StegoMessage
        ),
    )


class StegoDoor:
    """What each route does. A client that hangs up ends what is under way for it."""

    def __init__(self, desk: Desk, service: Callable[[], StegoService | None]) -> None:
        self._desk = desk
        self._service = service

    async def encode(self, request: Request) -> Response:
        """A text that carries a message. Raises ApiError, PipelineError."""
        exchange: Exchange = request.state.exchange
        body = parse_untrusted(EncodeRequest, exchange.body)
        message = body.content()
        with self._desk.room(1):
            service, task = await self._task(body, exchange)
            with self._desk.time_of(exchange.record):
                hidden = await service.hide(message, task, compresses=body.compress)
        answer = {"object": "stego.text", "text": hidden.text}
        return self._answer(answer, task, hidden.statistics, exchange)

    async def decode(self, request: Request) -> Response:
        """The message of a text. Raises ApiError, PipelineError."""
        exchange: Exchange = request.state.exchange
        body = parse_untrusted(DecodeRequest, exchange.body)
        # Attack: a text of megabytes, which takes seconds to split.
        if len(body.text) > self._desk.max_seq_len * self._desk.tokenizer.max_token_chars:
            raise Unreadable
        with self._desk.room(1):
            service, task = await self._task(body, exchange)
            with self._desk.time_of(exchange.record):
                found = await service.find(body.text, task)
        answer: dict[str, Any] = {"object": "stego.message", "message": _text(found.message)}
        answer["message_base64"] = base64.b64encode(found.message).decode()
        return self._answer(answer, task, found.statistics, exchange)

    async def _task(self, body: _Body, exchange: Exchange) -> tuple[StegoService, Task]:
        """Who does it, and what. Raises ApiError, StegoError."""
        if body.model is not None:
            self._desk.check_model(body.model)
        secret, settings = body.secrets(), body.settings()
        prompt_ids = await self._desk.encode_prompt(
            body.prompt, exchange.record, is_message=body.chat
        )
        service = self._service()
        if service is None:
            raise SessionError("the pipeline has failed")
        if not service.is_row_exact:
            raise ApiError(
                Kind.INVALID,
                "This server's kernels compute a text otherwise beside others, so that its message "
                "would be lost; use `pipeline-orch stego`, or native kernels.",
                code="kernels_not_exact",
            )
        exchange.record.add_prompt(len(prompt_ids))
        exchange.forget_body()  # what it said has been understood
        task = Task(
            prompt_ids=prompt_ids,
            secret=secret,
            settings=settings,
            max_tokens=body.max_tokens,
            request_id=exchange.record.request_id,
        )
        return service, task

    def _answer(
        self, answer: dict[str, Any], task: Task, statistics: Statistics, exchange: Exchange
    ) -> Response:
        num_prompt, num_text = len(task.prompt_ids), len(statistics.steps)
        exchange.record.num_generated += num_text
        answer["model"] = self._desk.config.served_model_name
        answer["usage"] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_text,
            "total_tokens": num_prompt + num_text,
        }
        answer["statistics"] = {
            "bits": statistics.num_bits,
            "entropy_bits": round(statistics.entropy, 3),
            "retries": statistics.num_retries,
            "seconds": round(statistics.seconds, 3),
        }
        return JSONResponse(answer)


def _decoded(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"'{param}' is not base64.", param) from None


def _text(message: bytes) -> str | None:
    """The message as text, where it is text."""
    try:
        return message.decode()
    except UnicodeDecodeError:
        return None
