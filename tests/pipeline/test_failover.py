"""What the user hears when a pipeline cannot be mended."""

import pytest
import trio

from pipeline.errors import SessionError
from pipeline.failover import run_with_failover


class Away:
    """A pipeline whose first attempt fails for another reason than the one that lasts."""

    waiting_for = "stage 1's control channel"

    def __init__(self, attempts):
        self._attempts = iter(attempts)

    async def connect(self, source):
        if failure := next(self._attempts):
            raise SessionError(failure)
        await trio.sleep_forever()


async def nothing(pipeline):
    raise AssertionError("it never stood")


async def test_giving_up_names_what_is_missing_now_not_what_failed_at_first(autojump_clock):
    with pytest.raises(SessionError, match=r"gave up after 10 s: stage 1's control channel"):
        await run_with_failover(Away(["stage 0 is lost", None]), nothing, None, 10.0)


async def test_giving_up_between_attempts_names_the_last_failure(autojump_clock):
    with pytest.raises(SessionError, match=r"gave up after 10 s: stage 0 is lost"):
        await run_with_failover(Away(["stage 0 is lost"] * 100), nothing, None, 10.0)
