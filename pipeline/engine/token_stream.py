"""A request's tokens on their way to whoever asked."""

from contextlib import suppress

import trio

from pipeline.engine.generation import TokenOutput
from pipeline.errors import PipelineError


class TokenStream(trio.abc.ReceiveChannel[TokenOutput]):
    """A request's tokens as they come.

    It has room for every token the request can have, so a client that reads slowly never holds up
    the others.
    """

    def __init__(self, room: int) -> None:
        # Why it ended without a last token.
        self.failure: PipelineError | None = None
        self._sender, self._outputs = trio.open_memory_channel[TokenOutput](room)

    def hear(self, event: TokenOutput | PipelineError) -> None:
        """Take a token, or the reason why none comes any more."""
        if isinstance(event, PipelineError):
            self.failure = event
            self._sender.close()
            return
        with suppress(trio.BrokenResourceError):  # nobody listens any more, and is about to leave
            self._sender.send_nowait(event)
        if event.finish is not None:
            self._sender.close()

    async def receive(self) -> TokenOutput:
        """The next token.

        Raises trio.EndOfChannel after the last, SessionError when the pipeline has failed,
        RequestFailed when only this request has.
        """
        try:
            return await self._outputs.receive()
        except trio.EndOfChannel:
            if self.failure is None:
                raise
            raise self.failure from None

    async def aclose(self) -> None:
        """Stop listening."""
        await self._outputs.aclose()

    def close(self) -> None:
        """Be done with it, on both sides."""
        self._sender.close()
        self._outputs.close()
