"""How often a worker that cannot last is tried, and how much is said of that."""

import pytest
import trio

from pipeline.placement.attempts import MAX_BACKOFF_SECONDS, PROBATION_SECONDS, Attempts


async def fail(attempts, seconds, reason="no weights"):
    """Attempts that cannot start, each after the pause that the one before asked for; pauses."""
    pauses = []
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        attempts.started(1)
        pauses.append(attempts.died(2, reason))
        await trio.sleep(pauses[-1])
    return pauses


def lines(caplog, event):
    return [each.getMessage() for each in caplog.records if event in each.getMessage()]


async def test_one_that_keeps_dying_is_tried_ever_more_seldom(autojump_clock):
    pauses = await fail(Attempts(0), 60)
    expected = [min(0.1 * 2**count, MAX_BACKOFF_SECONDS) for count in range(len(pauses))]
    assert pauses == pytest.approx(expected, rel=0.25)
    assert pauses[-1] > 5
    assert max(pauses) < 10  # what is mended serves again within ten seconds
    assert pauses[8:] != [pauses[8]] * len(pauses[8:])


@pytest.mark.parametrize("is_same", [True, False], ids=["same reason", "ever another"])
async def test_why_it_cannot_start_is_said_at_once_and_once(autojump_clock, caplog, is_same):
    attempts = Attempts(3)
    with caplog.at_level("INFO"):
        attempts.started(1)
        attempts.listening()
        attempts.died(-9, None)  # at once, as one that is killed twice
        for count in range(60):
            await fail(attempts, 10, "no weights" if is_same else f"no weights {count}")
    assert len(lines(caplog, "event=worker_died stage=3 code=2 error=no weights")) == 1
    assert len(caplog.records) <= 4


async def test_one_that_has_served_is_replaced_at_once_and_its_death_told(autojump_clock, caplog):
    attempts = Attempts(0)
    with caplog.at_level("INFO"):
        for _ in range(5):
            attempts.started(1)
            attempts.listening()
            await trio.sleep(2 * PROBATION_SECONDS)
            assert attempts.died(-9, None) == 0
    assert len(lines(caplog, "event=worker_died")) == 5


async def test_one_that_dies_whenever_it_has_loaded_for_long_is_not_tried_at_once(autojump_clock):
    attempts = Attempts(0)
    for expected in (None, "it ended with status -9"):
        attempts.started(1)
        await trio.sleep(100)
        assert attempts.died(-9, None) > 0
        assert attempts.problem == expected


async def test_one_that_ends_soon_after_it_has_started_fills_no_log(autojump_clock, caplog):
    attempts = Attempts(0)
    with caplog.at_level("INFO"):
        end = trio.current_time() + 600
        while trio.current_time() < end:
            attempts.started(1)
            attempts.listening()
            await trio.sleep(attempts.died(1, "internal error"))
    assert 8 <= len(lines(caplog, "event=worker_died")) <= 11
    assert len(caplog.records) <= 15


async def test_that_it_listens_after_all_is_told_and_ends_the_problem(autojump_clock, caplog):
    attempts = Attempts(0)
    await fail(attempts, 120)
    assert attempts.problem == "no weights"
    with caplog.at_level("INFO"):
        attempts.started(77)
        attempts.listening()
    assert attempts.problem is None
    assert lines(caplog, "pid=77") == ["event=worker_back stage=0 pid=77"]
