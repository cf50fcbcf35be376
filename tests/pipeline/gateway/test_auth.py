import pytest

from pipeline.errors import InputError
from pipeline.gateway.auth import KeyRing, is_local_name, load_api_keys
from pipeline.gateway.errors import ApiError, Kind


def test_keys_are_read_one_a_line(tmp_path):
    path = tmp_path / "keys"
    path.write_text("sk-one\n\n  sk-two \n")
    assert load_api_keys(path) == {"sk-one", "sk-two"}


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff", b"k" * 100_000])
def test_a_file_without_keys_is_the_users_error(tmp_path, content):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_api_keys(path)


def test_a_key_file_to_which_others_may_add_is_refused(tmp_path):
    path = tmp_path / "keys"
    path.write_text("sk-one\n")
    path.chmod(0o666)
    with pytest.raises(InputError, match="chmod go-w"):
        load_api_keys(path)


def test_a_missing_key_file_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        load_api_keys(tmp_path / "none")


@pytest.mark.parametrize("key", [b"sk-one", b"sk-two"])
def test_any_of_the_keys_opens(key):
    KeyRing(["sk-one", "sk-two"]).check(key)


@pytest.mark.parametrize("key", [None, b"", b"sk-one2", b"sk-on", b"\xff"])
def test_nothing_else_opens(key):
    with pytest.raises(ApiError) as caught:
        KeyRing(["sk-one"]).check(key)
    assert caught.value.kind is Kind.NO_KEY


def test_without_keys_nobody_is_asked_for_one():
    KeyRing([]).check(None)


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_is_local(name):
    assert is_local_name(name)


@pytest.mark.parametrize(
    "name", ["", "0.0.0.0", "::", "192.168.1.1", "localhost.example", "example", "127.0.0.1.nip.io"]
)
def test_everything_else_is_not(name):
    assert not is_local_name(name)
