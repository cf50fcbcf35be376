import pytest

from pipeline.errors import InputError
from pipeline.gateway.auth import Access, is_local_name, load_api_keys
from pipeline.gateway.errors import ApiError


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


@pytest.mark.parametrize("value", [b"Bearer sk-two", b"bearer sk-one", b"Bearer  sk-one "])
def test_any_of_the_keys_opens(value):
    Access(["sk-one", "sk-two"]).check({b"authorization": value})


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"sk-one", b"Basic sk-one", b"Bearer sk-one2", b"\xff"]
)
def test_nothing_else_opens(value):
    with pytest.raises(ApiError) as caught:
        Access(["sk-one"]).check({b"authorization": value, b"host": b"localhost"})
    assert caught.value.status == 401


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_is_local(name):
    assert is_local_name(name)


@pytest.mark.parametrize(
    "name", ["", "0.0.0.0", "::", "192.168.1.1", "localhost.example", "example", "127.0.0.1.nip.io"]
)
def test_everything_else_is_not(name):
    assert not is_local_name(name)
