"""What a session's stages have room for."""

from pipeline.codecs.base import ActivationCodec
from pipeline.protocol.step_limits import SessionLimits
from pipeline.protocol.tide_window import TideWindow
from transport.frozen import frozen


@frozen
class Limits:
    """What the stages have room for.

    `chunk_tokens` bounds a step's prompt tokens, so that a long prompt neither stalls its
    batch-mates nor needs activations of its whole length at once. As many steps are under way as
    there are stages, so that each has one to work on.
    """

    num_slots: int
    max_seq_len: int
    chunk_tokens: int = 512
    num_stages: int = 1
    # What a slot keeps of a request's tokens; None: all of them.
    window: TideWindow | None = None
    # Seconds between two tokens of a request that prompts of others may make of it.
    max_gap: float = 0.25
    # Whether `max_seq_len` is what the user wants, and no less will do.
    is_length_asked: bool = False

    @property
    def max_rows(self) -> int:
        """Positions of a slot."""
        return self.max_seq_len if self.window is None else self.window.size

    @property
    def max_step_tokens(self) -> int:
        """Most tokens a step can hold: a chunk, and one token of every other request."""
        return self.chunk_tokens + self.num_slots

    def for_session(
        self, codec: ActivationCodec, *, has_client_ends: bool = False
    ) -> SessionLimits:
        """What stages are asked for, their activations travelling by `codec`."""
        slots, length, rows = self.num_slots, self.max_seq_len, self.max_step_tokens
        return SessionLimits(slots, length, rows, codec, has_client_ends, self.window)
