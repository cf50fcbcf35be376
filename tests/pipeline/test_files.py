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

    def interrupted(*_):
        raise interruption

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit, InputError)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [check_writable, lambda path: write_atomically(path, "x")])
@pytest.mark.parametrize(
    "name", [".", "..", "", "file/x.json", "nowhere/x.json", "a" * 300, "a\0b"]
)
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


def test_a_private_file_is_its_owners_alone_also_where_another_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o644)
    write_atomically(path, "answer", is_private=True)
    assert path.stat().st_mode & 0o777 == 0o600


def test_replacing_a_file_gives_nobody_a_right_it_did_not_give(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o600)
    write_atomically(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "b.json", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "b.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_replaced_and_not_followed(tmp_path, exists):
    target, link = tmp_path / "target", tmp_path / "link.json"
    if exists:
        target.write_text("mine")
    link.symlink_to(target)
    check_writable(link)
    assert link.is_symlink()
    write_atomically(link, "new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert target.read_text() == "mine" if exists else not target.exists()


def test_a_name_that_another_took_first_is_neither_opened_nor_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.files.secrets.token_hex", lambda _: "guessed")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    taken = tmp_path / ".veilpipe.guessed"
    for take in (lambda: taken.symlink_to(victim), lambda: taken.write_text("trap")):
        take()
        with pytest.raises(InputError, match="cannot write"):
            write_atomically(tmp_path / "a.json", "secret", is_private=True)
        assert victim.read_text() == "mine"
        taken.unlink(missing_ok=True)


def test_no_two_writes_use_the_same_name(tmp_path, monkeypatch):
    names = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: names.append(path) or real(path, *rest))
    for _ in range(20):
        write_atomically(tmp_path / "a.json", "x")
    assert len(set(names)) == 20
