import pytest

from pipeline.gateway.auth import KeyRing
from pipeline.gateway.errors import ApiError, Kind
from pipeline.gateway.http.access import Access


@pytest.mark.parametrize("value", [b"Bearer sk-two", b"bearer sk-one", b"Bearer  sk-one "])
def test_a_bearers_key_opens(value):
    Access(KeyRing(["sk-one", "sk-two"])).check({b"authorization": value})


@pytest.mark.parametrize(
    "value", [b"", b"Bearer", b"Bearer ", b"sk-one", b"Basic sk-one", b"Bearer sk-one2", b"\xff"]
)
def test_nothing_else_opens(value):
    with pytest.raises(ApiError) as caught:
        Access(KeyRing(["sk-one"])).check({b"authorization": value, b"host": b"localhost"})
    assert caught.value.kind is Kind.NO_KEY
