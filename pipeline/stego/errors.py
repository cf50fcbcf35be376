"""What can go wrong with a hidden message."""

from pipeline.errors import InputError


class StegoError(InputError):
    """A message cannot be hidden in, or read from, what was given."""
