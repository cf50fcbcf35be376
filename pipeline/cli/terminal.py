"""Text on stdout. What a model says reaches a terminal as text and as nothing else.

A terminal obeys control characters: they set its title and clipboard, move what is already
there, ask it to type. A model says what its prompt or its makers want. So on a terminal every
control character but line breaks and tabs is shown as its escape, and so are those that turn the
direction of text, behind which words can hide. Each stands for itself, so that a sequence begun in
one token and ended in the next is no way around. Into files and pipes text goes unchanged.
"""

import sys

_DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x2070)]
_LINES = [0x2028, 0x2029]
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS, *_LINES, *range(0xFFF9, 0xFFFC)]
_SHOWN = {
    code: chr(code).encode("unicode_escape").decode()
    for code in _CONTROLS
    if chr(code) not in "\n\t"
}


def harmless(text: str) -> str:
    """`text` with every character that would drive a terminal shown as its escape."""
    return text.translate(_SHOWN)


def write_text(text: str) -> None:
    """Write to stdout at once. Raises OSError."""
    if sys.stdout.isatty():
        text = harmless(text)
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()
