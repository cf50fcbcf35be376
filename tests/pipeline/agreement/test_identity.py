"""The files of identity keys."""

import pytest

from pipeline.agreement.identity import create_identity, load_identity
from pipeline.errors import InputError, PolicyError


def test_a_key_file_open_to_others_is_refused(tmp_path):
    path = tmp_path / "key.pem"
    create_identity(path)
    load_identity(path)
    path.chmod(0o644)
    with pytest.raises(PolicyError, match="chmod 600"):
        load_identity(path)


def test_a_key_file_that_others_could_swap_is_neither_used_nor_made(tmp_path):
    path = tmp_path / "key.pem"
    create_identity(path)
    tmp_path.chmod(0o770)
    with pytest.raises(PolicyError, match="chmod go-w"):
        load_identity(path)
    with pytest.raises(PolicyError, match="chmod go-w"):
        create_identity(tmp_path / "new.pem")
    assert not (tmp_path / "new.pem").exists()


def test_a_key_file_behind_a_link_is_refused_and_none_is_written_through_one(tmp_path):
    path, link = tmp_path / "key.pem", tmp_path / "link.pem"
    link.symlink_to(path)
    with pytest.raises(InputError, match="exists"):
        create_identity(link)
    create_identity(path)
    with pytest.raises(PolicyError, match="symbolic link"):
        load_identity(link)
