import os

import pytest

from pipeline.cli import prompt_input
from pipeline.cli.prompt_input import read_prompt
from pipeline.errors import InputError


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"Hello", "Hello"),
        ("Héllo 🦊\n".encode(), "Héllo 🦊"),
        (b"two\nlines\n\n", "two\nlines\n"),
        (b"dos\r\n", "dos"),
        (b"\xef\xbb\xbfmarked", "marked"),
        (b"", ""),
    ],
)
def test_a_file_is_the_prompt_without_the_editors_line_break(tmp_path, content, text):
    path = tmp_path / "prompt"
    path.write_bytes(content)
    assert read_prompt(None, path) == text


def test_what_was_typed_is_taken_as_it_is():
    assert read_prompt("a\n", None) == "a\n"
    assert read_prompt(None, None) is None


def test_a_hyphen_is_stdin(tmp_path, monkeypatch):
    (tmp_path / "in").write_bytes(b"from a pipe\n")
    with (tmp_path / "in").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert read_prompt(None, prompt_input.Path("-")) == "from a pipe"
        os.fstat(stdin.fileno())  # and it is still open
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="stdin: it is closed"):
        read_prompt(None, prompt_input.Path("-"))


@pytest.mark.parametrize("name", ["nowhere", ".", "a\0b", "a" * 300])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="--text-file: cannot read") as caught:
        read_prompt(None, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_is_refused_and_not_quoted(tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(b"secret \xff")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        read_prompt(None, path)
    assert "secret" not in str(caught.value)


def test_a_device_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(prompt_input, "MAX_PROMPT_BYTES", 1000)
    with pytest.raises(InputError, match="larger than 1000"):
        read_prompt(None, prompt_input.Path("/dev/zero"))


def test_two_prompts_are_one_too_many(tmp_path):
    with pytest.raises(InputError, match="exclude each other"):
        read_prompt("a", tmp_path / "x")
