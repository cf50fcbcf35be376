import os

import pytest

from pipeline.errors import InputError
from pipeline.files import check_writable, write_atomically


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit(143), OSError(28, "full")])
def test_an_interrupted_write_leaves_the_old_content_alone(tmp_path, monkeypatch, interruption):
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted(self, target):
        raise interruption

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit, InputError)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [check_writable, lambda path: write_atomically(path, "x")])
@pytest.mark.parametrize("name", [".", "..", "", "file/x.json", "nowhere/x.json", "a" * 300])
def test_a_name_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, write, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    path = tmp_path.__class__(name)
    with pytest.raises(InputError, match="cannot write") as caught:
        write(path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_is_not_a_file_is_not_replaced_by_one(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match="not a regular file"):
        write_atomically(fifo, "x")
    assert fifo.is_fifo()


def test_checking_writes_nothing(tmp_path):
    path = tmp_path / "a.json"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old"
