"""A request's own time: counted from when it began, and over for that request alone."""

import pytest
import trio

from pipeline.engine.request_time import request_time
from pipeline.errors import RequestTimedOut


async def test_what_takes_longer_is_ended_and_says_how_long_it_had(autojump_clock):
    began = trio.current_time()
    with pytest.raises(RequestTimedOut, match="longer than the 5 s"), request_time(5, began):
        await trio.sleep_forever()
    assert trio.current_time() == began + 5
    with pytest.raises(RequestTimedOut), request_time(5, began):  # whose time has been over
        await trio.sleep_forever()
    assert trio.current_time() == began + 5


async def test_what_is_done_in_time_and_what_has_no_limit_goes_on(autojump_clock):
    with request_time(5, trio.current_time()):
        await trio.sleep(4)
    with request_time(None, trio.current_time()):
        await trio.sleep(3600)


async def test_time_begins_when_the_request_does_and_once(autojump_clock):
    began = trio.current_time() + 100

    async def ask_twice():
        with request_time(5) as begin:
            await trio.sleep_until(began)
            begin(began)
            await trio.sleep(4)
            begin(trio.current_time())
            await trio.sleep_forever()

    with pytest.raises(RequestTimedOut):
        await ask_twice()
    assert trio.current_time() == began + 5


async def test_a_cancellation_from_outside_stays_one(autojump_clock):
    with trio.move_on_after(1) as outer, request_time(5, trio.current_time()):
        await trio.sleep_forever()
    assert outer.cancelled_caught
