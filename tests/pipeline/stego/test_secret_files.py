"""Secrets in files, their owner's alone."""

import pytest

from pipeline.stego.errors import StegoError
from pipeline.stego.fingerprint import Fingerprint
from pipeline.stego.secret_files import (
    create_secret,
    fingerprint_path,
    read_fingerprint,
    read_secret,
)


def private(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def test_a_secret_is_its_owners_and_its_fingerprint_lies_beside_it(tmp_path):
    path, fingerprint = tmp_path / "secret", Fingerprint(top_k=7)
    beside = create_secret(path, fingerprint)
    assert beside == fingerprint_path(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_secret(path, None).key == path.read_bytes()
    assert read_fingerprint(path) == fingerprint
    assert path.read_bytes() not in beside.read_bytes()


def test_two_secrets_differ_and_none_is_overwritten(tmp_path):
    create_secret(tmp_path / "a", Fingerprint())
    create_secret(tmp_path / "b", Fingerprint())
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()
    with pytest.raises(StegoError, match="File exists"):
        create_secret(tmp_path / "a", Fingerprint())


@pytest.mark.parametrize(("content", "passphrase"), [
    (b"correct horse\n", b"correct horse"), (b"two\nlines\r\n", b"two\nlines"),
    (b"caf\xc3\xa9", b"caf\xc3\xa9"),
])  # fmt: skip
def test_a_passphrase_is_a_file_without_the_editors_line_break(tmp_path, content, passphrase):
    assert read_secret(None, private(tmp_path / "p", content)).passphrase == passphrase


def test_both_may_be_given(tmp_path):
    create_secret(tmp_path / "secret", Fingerprint())
    both = read_secret(tmp_path / "secret", private(tmp_path / "p", b"horse"))
    assert both.key
    assert both.passphrase == b"horse"


@pytest.mark.parametrize("content", [b"", b"\n", b"p" * 1025])
def test_passphrases_of_no_length_and_too_much_are_refused(tmp_path, content):
    with pytest.raises(StegoError, match="1 to 1024 bytes"):
        read_secret(None, private(tmp_path / "p", content))


@pytest.mark.parametrize("content", [b"", bytes(31), bytes(33), b"a passphrase\n"])
def test_a_file_that_is_no_secret_is_refused(tmp_path, content):
    with pytest.raises(StegoError, match="no secret"):
        read_secret(private(tmp_path / "s", content), None)


def test_files_that_others_can_read_or_that_are_not_there_are_refused(tmp_path):
    path = private(tmp_path / "s", bytes(32))
    path.chmod(0o644)
    with pytest.raises(StegoError, match="open to other users"):
        read_secret(path, None)
    with pytest.raises(StegoError, match="No such file"):
        read_secret(tmp_path / "none", None)
    with pytest.raises(StegoError, match="secret file"):
        create_secret(tmp_path / "none" / "s", Fingerprint())


def test_no_fingerprint_is_none_and_a_broken_one_an_error(tmp_path):
    assert read_fingerprint(None) is None
    path = private(tmp_path / "s", bytes(32))
    assert read_fingerprint(path) is None
    fingerprint_path(path).write_text("{")
    with pytest.raises(StegoError, match="no fingerprint"):
        read_fingerprint(path)
