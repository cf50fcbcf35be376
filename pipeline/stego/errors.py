"""What can go wrong with a hidden message."""

from pipeline.errors import InputError


class StegoError(InputError):
    """A message cannot be hidden in, or read from, what was given."""


class Unreadable(StegoError):
    """A text has no message for whoever reads it so; nothing says which of the causes it is."""

    def __init__(self, differences: str = "") -> None:
        """`differences`: in what the reader is known not to agree with the writer."""
        super().__init__(
            "no message can be read: wrong secret, model or settings, or altered text"
            + (f"; {differences}" if differences else "")
        )
