"""Warnings about what fails again and again."""

import logging

import trio

logger = logging.getLogger(__name__)

REMINDER_SECONDS = 60.0


class Notes:
    """Says each thing once a minute at most: what fails again and again fills no log."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def warn(self, message: str, *values: object) -> None:
        """Log a warning, unless it was said a short while ago."""
        now = trio.current_time()
        self._said = {text: until for text, until in self._said.items() if now < until}
        text = message % values
        if text not in self._said:
            self._said[text] = now + REMINDER_SECONDS
            logger.warning(message, *values)
