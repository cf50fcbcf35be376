"""What is kept of responses is each caller's own, and bounded."""

from contextlib import suppress

import pytest

from pipeline.gateway.dialects.responses_store import ResponseStore
from pipeline.gateway.errors import ApiError

ITEM = {"role": "user", "content": "Hi"}


def response(number, text="Yes", logprobs=()):
    part = {"type": "output_text", "text": text, "logprobs": list(logprobs)}
    message = {"type": "message", "id": f"msg_{number}_0", "role": "assistant", "content": [part]}
    return {"id": f"resp_{number}", "output": [message]}


def kept(store, caller, numbers):
    found = []
    for number in numbers:
        with suppress(ApiError):
            store.get(caller, f"resp_{number}")
            found.append(number)
    return found


def test_the_oldest_are_forgotten_and_nobody_elses():
    store = ResponseStore(max_responses=3)
    store.put(b"b", [ITEM], response(0))
    for number in range(1, 6):
        store.put(b"a", [ITEM], response(number))
    assert kept(store, b"a", range(6)) == [3, 4, 5]
    assert kept(store, b"b", range(6)) == [0]


def test_what_a_caller_takes_is_bounded_in_bytes():
    store = ResponseStore(max_bytes=5000)
    for number in range(20):
        store.put(b"a", [{"role": "user", "content": "x" * 500}], response(number))
    left = kept(store, b"a", range(20))
    assert left == list(range(20 - len(left), 20))
    assert 3 <= len(left) <= 6
    assert sum(store.get(b"a", f"resp_{number}").num_bytes for number in left) <= 5000
    store.put(b"a", [ITEM], response(20, "x" * 5000))
    assert kept(store, b"a", range(21)) == []


def test_a_conversation_goes_on_without_logprobs_and_the_response_has_them():
    store = ResponseStore()
    store.put(b"a", [ITEM], response(1, logprobs=[{"token": "Yes"}]))
    items = store.conversation(b"a", "resp_1")
    assert items[0] == ITEM
    assert items[1]["content"][0]["logprobs"] == []
    assert b'"token":"Yes"' in store.get(b"a", "resp_1").response
    assert store.conversation(b"a", None) == ()


@pytest.mark.parametrize("item_id", ["msg_1_1", "msg_2_0", "msg_1", "msg", "", "1_1_0_0"])
def test_items_are_found_by_their_own_ids_alone(item_id):
    store = ResponseStore()
    store.put(b"a", [ITEM], response(1))
    assert store.finder(b"a")("msg_1_0")["role"] == "assistant"
    with pytest.raises(ApiError):
        store.finder(b"a")(item_id)
    with pytest.raises(ApiError):
        store.finder(b"b")("msg_1_0")
