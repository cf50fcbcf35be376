"""What of a model's text reaches a terminal, and what a pipe."""

import os
import pty
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.terminal import harmless

TEXTS = [
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b2J",  # the same in one byte of C1
    "\x9d52;c;aGk=\x9c",  # sets the clipboard
    "\x90q\x9c",
    "\x1bP+q\x1b\\",
    "one\rtwo",
    "\x08\x08\x7f\x00\x0e\x05",
    "\u202eevil\u202c",
    "\u2066a\u2069\u200f\u061c",
    "\u2028\u2029",
]


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_that_drives_a_terminal_is_left(text):
    shown = harmless(text)
    assert shown.isprintable()
    assert harmless(shown) == shown


@given(st.text())
def test_every_character_stands_for_itself_so_pieces_make_no_difference(text):
    assert "".join(map(harmless, text)) == harmless(text)
    for char in harmless(text):
        assert char in "\n\t" or unicodedata.category(char) != "Cc"
        assert unicodedata.bidirectional(char) not in {
            "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI",
        }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["plain\n\ttext", "naïve 日本語", "👩\u200d🚀 🏴", "می\u200cخواهم", "עברית", "\\x1b"]
)
def test_text_stays_text(text):
    assert harmless(text) == text


SAY = "from pipeline.cli.terminal import write_text; write_text({text!r})"


def run(text, stdout):
    command = [sys.executable, "-c", SAY.format(text=text)]
    return subprocess.run(command, stdout=stdout, check=True, timeout=300)


def test_a_pipe_gets_the_very_bytes_and_a_terminal_does_not():
    text = "a\x1b]0;x\x07\x9b\u202e\r\n日b"
    assert run(text, subprocess.PIPE).stdout == text.encode()
    leader, follower = pty.openpty()
    try:
        run(text, follower)
        shown = os.read(leader, 1000).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert shown == "a\\x1b]0;x\\x07\\x9b\\u202e\\r\r\n日b"
