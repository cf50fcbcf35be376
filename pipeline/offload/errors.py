"""What can go wrong with products that others compute."""

from pipeline.errors import InputError, SessionRefused


class WrongProduct(SessionRefused):
    """A linear worker answered something else than the product it was asked for.

    Whoever lies is not asked again and again, until a lie passes.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"the linear worker's answer for {name} is wrong, and was not used")
        self.name = name


class MasksSpent(SessionRefused):
    """There are no masks left for what is to be hidden."""


class MasksUnusable(SessionRefused):
    """Which masks are used cannot be noted."""


class OtherMasks(InputError):
    """A file of masks was made for another model than the one to be hidden."""
