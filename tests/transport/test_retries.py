"""Attempts at a peer that is not up: how far apart, and how many."""

import pytest
import trio

from transport.errors import AttemptsSpent, EndpointError, MisuseError
from transport.retries import Retries, RetryPolicy

ERROR = EndpointError("nobody listens")


async def pauses(retries, count, **options):
    """When each began, and how long it was."""
    found = []
    for _ in range(count):
        began = trio.current_time()
        await retries.pause(ERROR, **options)
        found.append((began, trio.current_time() - began))
    return found


async def test_pauses_grow_with_the_time_away_and_chance_shortens_them(autojump_clock):
    policy = RetryPolicy(first_s=0.1, last_s=3.0, share=0.5, jitter=0.5)
    began = trio.current_time()
    shares = []
    for at, seconds in await pauses(Retries(policy), 40):
        most = min(max(0.1, 0.5 * (at - began)), 3.0)
        shares.append(seconds / most)
    assert all(0.5 - 1e-6 <= share <= 1 + 1e-6 for share in shares)
    assert len({round(share, 6) for share in shares}) > 30


async def test_without_chance_pauses_are_what_they_are(autojump_clock):
    retries = Retries(RetryPolicy(first_s=0.1, last_s=1.0, share=0.0, jitter=0.0))
    assert [seconds for _, seconds in await pauses(retries, 2)] == pytest.approx([0.1, 0.1])
    longer = await pauses(retries, 1, at_least_s=0.4)
    assert longer[0][1] == pytest.approx(0.4)


@pytest.mark.parametrize("attempts", [1, 4])
async def test_attempts_are_counted_and_the_last_failure_is_told(autojump_clock, attempts):
    retries = Retries(RetryPolicy(attempts=attempts))
    for _ in range(attempts - 1):
        await retries.pause(EndpointError("an earlier one"))
    with pytest.raises(AttemptsSpent, match=f"nobody listens; attempts made: {attempts}") as caught:
        await retries.pause(ERROR)
    assert caught.value.__cause__ is ERROR


@pytest.mark.parametrize(
    "wrong",
    [{"first_s": 0}, {"first_s": 3}, {"share": -1}, {"jitter": 1}, {"attempts": 0},
     {"last_s": float("nan")}],
    ids=str,
)  # fmt: skip
def test_what_is_no_policy_is_refused(wrong):
    with pytest.raises(MisuseError):
        RetryPolicy(**wrong)
