"""The answering side: whoever authenticates as the asking stage gets a handler of its own."""

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from pipeline.protocol.peer_connections import (
    PATIENCE_MS,
    accept_all,
    close_quietly,
    describe,
    hear_out,
)
from pipeline.remote_parts.wire import Message, PartRefusal, answer_frame, refusal_frame
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel
from transport.dial_and_listen import Listener
from transport.errors import TransportError
from transport.handshake import Credentials, Link
from transport.tensor_frames import FrameLimits, Tensor

logger = logging.getLogger(__name__)


class PartHandler(Protocol):
    """What a mode's worker does in one session."""

    def answer(self, header: bytes, tensors: tuple[Tensor, ...]) -> Message:
        """The answer to a question, whose tensors are valid until this returns.

        Raises PartRefusal; then the session is over.
        """
        ...

    def close(self) -> None:
        """Forget the session: nothing of it may stay in memory."""
        ...


class PartServer:
    """Serves sessions side by side, question by question."""

    def __init__(
        self,
        link: Link,
        credentials: Credentials,
        limits: FrameLimits,
        new_handler: Callable[[], PartHandler],
    ) -> None:
        self._link = link
        self._credentials = credentials
        self._limits = limits
        self._new_handler = new_handler
        # By the key of whoever asks, and when its handler has been closed.
        self._sessions: dict[bytes, tuple[trio.CancelScope, trio.Event]] = {}

    async def serve(self, listener: Listener, *, once: bool = False) -> None:
        """Serve until cancelled, or with `once` until the first session has ended."""
        async with open_tasks() as tasks:

            async def welcome(channel: SecureChannel) -> None:
                await self._serve_session(channel)
                if once:
                    tasks.cancel_scope.cancel()

            await accept_all(listener, self._link, self._credentials, self._limits, welcome)

    async def _serve_session(self, channel: SecureChannel) -> None:
        """One session; one before of the same peer, whose end a network has lost, ends here."""
        key = channel.peer.static_key
        if key in self._sessions:
            before, is_closed = self._sessions[key]
            before.cancel()
            await is_closed.wait()
        own = self._sessions[key] = trio.CancelScope(), trio.Event()
        try:
            with own[0]:
                await self._answer_all(channel, own[1])
        finally:
            if self._sessions.get(key) is own:
                del self._sessions[key]

    async def _answer_all(self, channel: SecureChannel, is_closed: trio.Event) -> None:
        logger.info("event=session_started")
        handler = self._new_handler()
        reason = "closed"
        try:
            channel.wait_in_place(PATIENCE_MS)
            while True:
                await channel.peek()  # one compiled call, where all of a question has come
                frame = await channel.receive()
                await channel.send(answer_frame(*handler.answer(frame.header, frame.tensors)))
        except trio.EndOfChannel:
            pass  # who asked has no more questions
        except PartRefusal as error:
            reason = str(error)
            await self._refuse(channel, reason)
        except TransportError as error:
            reason = describe(error)
        except Exception as error:
            # A defect here must not cost the next session its worker. The type alone: the text of
            # an unexpected error may hold anything.
            reason = f"internal error ({type(error).__name__})"
            is_verbose = logger.isEnabledFor(logging.DEBUG)
            logger.error("event=session_failed error=%s", reason, exc_info=is_verbose)
            await self._refuse(channel, reason)
        finally:
            handler.close()
            is_closed.set()
            await close_quietly(channel)
        logger.info("event=session_ended reason=%s", reason)

    async def _refuse(self, channel: SecureChannel, reason: str) -> None:
        try:
            await channel.send(refusal_frame(reason))
            await hear_out(channel)
        except (TransportError, trio.ClosedResourceError):
            pass  # who asked has gone, and need not hear it
