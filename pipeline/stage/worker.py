"""The stage worker: a trio shell that serves one orchestrator after another."""

import logging
import math
from collections.abc import Callable
from typing import Literal

import trio

from pipeline.errors import MessageError, SessionError, SessionRefused
from pipeline.protocol.links import CONTROL_LIMITS, ControlLink
from pipeline.protocol.messages import Failure, Health, Message
from pipeline.protocol.peer_connections import (
    CONTROL_EPOCH,
    ORCHESTRATOR,
    Entrance,
    accept_each,
    close_quietly,
    describe,
    hear_out,
    say,
)
from pipeline.stage.session import SessionEnded, StageSession
from pipeline.stage.session_admission import check_init, with_memory
from pipeline.stage.stage_metrics import StageMeter
from pipeline.stage.worker_setup import StageSetup
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel
from transport.dial_and_listen import Listener
from transport.errors import TransportError
from transport.handshake import Link, LinkKind

logger = logging.getLogger(__name__)

# An orchestrator that has been restarted may be here before its last session is quite over.
BUSY_SECONDS = 1.0
# It asks every second: one that has not, and comes again, has lost its connection.
STALE_SECONDS = 5.0


class StageWorker:
    """Serves one stage on two listeners, one session at a time."""

    def __init__(self, setup: StageSetup) -> None:
        self._setup = setup
        self._meter = StageMeter()
        self._session = trio.Lock()
        self._current: StageSession | None = None
        # Whose turn it is.
        self._holder: ControlLink | None = None
        self._held_since = -math.inf
        self._turn = trio.CancelScope()
        # Who is here, with or without a turn, and when each has gone.
        self._links: dict[trio.CancelScope, trio.Event] = {}

    async def serve(self, control: Listener, data_in: Listener, *, once: bool = False) -> None:
        """Serve sessions until cancelled, or with `once` until the first one has ended."""
        async with open_tasks() as tasks:

            def on_session_over() -> None:
                if once:
                    tasks.cancel_scope.cancel()

            entrance = self.entrance(data_in, on_session_over)
            await accept_each(control, lambda: (entrance,), times=self._setup.times)

    def entrance(
        self, data_in: Listener, on_session_over: Callable[[], None] = lambda: None
    ) -> Entrance:
        """What answers this stage's orchestrators on a control listener."""
        setup = self._setup
        core_hash = setup.manifest.core_hash()
        link = Link(LinkKind.CONTROL, ORCHESTRATOR, setup.role, core_hash, CONTROL_EPOCH)
        credentials = setup.trust.toward(ORCHESTRATOR, {})

        async def welcome(channel: SecureChannel) -> None:
            self._meter.count_handshake()
            if await self._serve_link(ControlLink(channel), data_in):
                on_session_over()

        return Entrance(link, credentials, CONTROL_LIMITS, welcome)

    @property
    def holder_key(self) -> bytes | None:
        """The key of the orchestrator whose session is under way, if one is."""
        return None if self._holder is None else self._holder.channel.peer.static_key

    async def end(self) -> None:
        """End what is under way; whoever holds this worker can then let go of it."""
        await self.leave()
        self._turn.cancel()
        async with self._session:
            # Nobody has a turn after this; and who still parts would keep the weights meanwhile.
            parting = tuple(self._links.items())
            for scope, _ in parting:
                scope.cancel()
            for _, has_gone in parting:
                await has_gone.wait()

    async def leave(self) -> None:
        """Let the step under way go on, and say that this stage leaves: then it can be ended."""
        if self._current is not None:
            await self._current.leave()

    async def _serve_link(self, control: ControlLink, data_in: Listener) -> bool:
        """Run one session; False when another one is running, or when it never began."""
        has_begun = False
        with trio.CancelScope() as scope:
            self._links[scope] = has_gone = trio.Event()
            try:
                has_begun = await self._take_turn(control, data_in)
                await hear_out(control.channel)
            finally:
                await close_quietly(control.channel)
                del self._links[scope]
                has_gone.set()
        return has_begun

    async def _take_turn(self, control: ControlLink, data_in: Listener) -> bool:
        """Run one session; False when another one is running, or when it never began."""
        with trio.move_on_after(BUSY_SECONDS) as patience:
            await self._session.acquire()
        if patience.cancelled_caught and self._make_way_for(control):
            await self._session.acquire()
        elif patience.cancelled_caught:
            logger.warning("event=refused reason=busy")
            await say(control, Failure(code="busy", detail="another orchestrator is connected"))
            return False
        try:
            with trio.CancelScope() as self._turn:
                self._holder, self._held_since = control, trio.current_time()
                return await self._run_session(control, data_in)
            return False
        finally:
            self._current = self._holder = None  # they would keep the session's memory
            self._session.release()

    def _make_way_for(self, newcomer: ControlLink) -> bool:
        """End the turn of one that has asked for nothing for long, or of the same one, gone silent.

        A network that lost its goodbye would keep the same orchestrator out for as long as silence
        is borne. Attack: one that only ever asks how the stage is would keep all others out.
        """
        holder, now = self._holder, trio.current_time()
        if holder is None:
            return False
        is_idle = self._current is None and now - self._held_since >= self._setup.times.init_seconds
        is_same = holder.channel.peer.static_key == newcomer.channel.peer.static_key
        if not is_idle and not (is_same and now - holder.heard_at >= STALE_SECONDS):
            return False
        logger.info("event=session_superseded stage=%d", self._setup.stage_idx)
        self._turn.cancel()
        return True

    async def _first_message(self, control: ControlLink) -> Message:
        """What comes after the questions of an orchestrator that still waits for other stages."""
        seconds = self._setup.times.idle_seconds
        while True:
            try:
                with trio.fail_after(seconds):
                    message = await control.receive()
                    if not isinstance(message, Health):
                        return message
                    await control.send(self._meter.answer(message, core=None))
            except trio.TooSlowError:
                raise SessionEnded(f"orchestrator silent for {seconds:g} s") from None

    async def _run_session(self, control: ControlLink, data_in: Listener) -> bool:
        """Serve until the session ends; whether it got past `init`."""
        has_begun = False
        stage_idx = self._setup.stage_idx
        logger.info("event=session_started stage=%d", stage_idx)
        try:
            message = await self._first_message(control)
            setup = with_memory(self._setup)
            init, limits = check_init(message, setup)
            has_begun = True
            self._current = StageSession(setup, self._meter, control, init, limits)
            await self._current.run(data_in)
        except SessionEnded as ended:
            logger.info("event=session_ended stage=%d reason=%s", stage_idx, ended.reason)
        except SessionRefused as error:
            logger.warning("event=session_refused stage=%d error=%s", stage_idx, error)
            await say(control, Failure(code="refused", detail=describe(error)))
        except (SessionError, TransportError, trio.EndOfChannel) as error:
            logger.warning("event=session_failed stage=%d error=%s", stage_idx, describe(error))
            # One that begins with a message unknown here is of another version, today and later.
            is_refused = isinstance(error, MessageError) and not has_begun
            code: Literal["refused", "failed"] = "refused" if is_refused else "failed"
            await say(control, Failure(code=code, detail=describe(error)))
        except Exception as error:
            # A defect here must not cost the next orchestrator its stage. The type alone: the text
            # of an unexpected error may hold anything.
            name = type(error).__name__
            is_verbose = logger.isEnabledFor(logging.DEBUG)
            logger.error(
                "event=session_failed stage=%d error=internal type=%s",
                stage_idx,
                name,
                exc_info=is_verbose,
            )
            await say(control, Failure(code="failed", detail=f"internal error ({name})"))
        return has_begun
