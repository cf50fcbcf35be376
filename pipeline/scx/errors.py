"""What can go wrong with encoded keys and values."""

from pipeline.errors import InputError, SessionRefused


class ScxError(InputError):
    """What was asked of the encoding cannot be done."""


class CacheRefused(ScxError):
    """A cache is not what these keys encoded; nothing says which of the causes it is."""

    def __init__(self, layer: int, difference: str = "") -> None:
        """`difference`: what is seen without a key, such as a number of rows."""
        super().__init__(
            f"the encoded cache of layer {layer} is refused: other keys, session, epoch or model, "
            "or altered, missing or older rows" + (f"; {difference}" if difference else "")
        )
        self.layer = layer


class AnswerRefused(SessionRefused):
    """Whoever holds a cache answered what no honest holder can answer.

    Whoever lies is not asked again and again, until a lie is believed.
    """
