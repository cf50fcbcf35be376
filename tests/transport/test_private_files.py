"""A secret is its owner's alone: what others may read, change or swap is neither read nor made."""

import os
import stat
from pathlib import Path

import pytest

from transport import private_files
from transport.errors import MisuseError
from transport.private_files import create_private, read_private, require_unwritable


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "a key.pem"
    create_private(path, b"secret")
    return path


def give_away(path, monkeypatch):
    """Make it another user's, or us."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def test_what_is_written_is_read_back_and_open_to_nobody_else(secret):
    assert read_private(secret) == b"secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


@pytest.mark.parametrize("bit", [0o040, 0o020, 0o010, 0o004, 0o002, 0o001])
def test_a_file_on_which_others_have_any_right_is_refused(secret, bit):
    secret.chmod(0o600 | bit)
    with pytest.raises(MisuseError, match=r"chmod 600 '.*a key.pem'"):
        read_private(secret)


@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_a_directory_in_which_others_may_swap_files_is_refused(secret, bit):
    secret.parent.chmod(0o700 | bit)
    for use in (read_private, lambda path: create_private(path.with_name("new"), b"")):
        with pytest.raises(MisuseError, match="chmod go-w"):
            use(secret)
    assert not secret.with_name("new").exists()


def test_a_directory_where_each_may_change_only_their_own_will_do(secret):
    secret.parent.chmod(0o1777)
    assert read_private(secret) == b"secret"


@pytest.mark.parametrize("whose", ["file", "directory"])
def test_what_belongs_to_another_user_is_refused(secret, whose, monkeypatch):
    give_away(secret if whose == "file" else secret.parent, monkeypatch)
    with pytest.raises(MisuseError, match="belongs to another user"):
        read_private(secret)


def test_no_link_is_followed_in_either_direction(secret, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(secret)
    with pytest.raises(MisuseError, match="symbolic link"):
        read_private(link)
    target = tmp_path / "target"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(target)
    with pytest.raises(FileExistsError):
        create_private(dangling, b"secret")
    assert not target.exists()


def test_nothing_is_written_over(secret):
    with pytest.raises(FileExistsError):
        create_private(secret, b"other")
    assert read_private(secret) == b"secret"


def test_what_cannot_be_written_whole_is_not_left(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private_files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        create_private(tmp_path / "key", b"secret")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path, make):
    path = tmp_path / "odd"
    make(path, 0o600)
    with pytest.raises((MisuseError, IsADirectoryError), match=r"regular file|Is a directory"):
        read_private(path)


def test_an_endless_file_is_not_read_to_its_end(secret, monkeypatch):
    secret.write_bytes(bytes(2 * private_files.MAX_PRIVATE_BYTES))
    assert len(read_private(secret)) == private_files.MAX_PRIVATE_BYTES


def test_a_missing_file_or_directory_is_the_systems_error(tmp_path):
    for path in (tmp_path / "none", tmp_path / "none" / "none", Path("/dev/null/none")):
        with pytest.raises(OSError, match=r"No such file|Not a directory"):
            read_private(path)


def test_a_readable_file_may_be_read_by_others_and_written_by_none(tmp_path, monkeypatch):
    path = tmp_path / "list"
    path.write_text("")
    path.chmod(0o644)
    require_unwritable(path, path.stat())
    path.chmod(0o664)
    with pytest.raises(MisuseError, match="chmod go-w"):
        require_unwritable(path, path.stat())
    path.chmod(0o644)
    give_away(path, monkeypatch)
    with pytest.raises(MisuseError, match="another user"):
        require_unwritable(path, path.stat())
