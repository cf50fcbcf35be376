"""Prompts are read in what is left of steps' time: learnt, not fixed. Time is simulated."""

import pytest

from pipeline.engine.step_pace import FIRST_TOKENS, LEAST_TOKENS, MOST_STEPS, Pace
from tests.pipeline.engine.timed_stages import Stages

SMALL = (0.020, 0.004)  # two stages of a model of a billion parameters on a core each
INT8 = (0.043, 0.00285)  # its weights in int8, which are read while rows are computed


def beside_a_stream(stages, *prompts, known=True):
    """A stream, and prompts that come while it runs; when the last of them was read."""
    if known:  # what prompts cost has been learnt from one before
        stages.submit(99, 300, 1)
        stages.run()
    stages.submit(0, 5, 3000)
    stages.until(lambda: len(stages.heard.get(0, ())) > 20)
    began = stages.now
    for index, length in enumerate(prompts, start=1):
        stages.submit(index, length, 1)
    stages.until(lambda: all(index in stages.heard for index in range(1, len(prompts) + 1)))
    return began, max(stages.heard[index][0] for index in range(1, len(prompts) + 1))


@pytest.mark.parametrize("known", [True, False])
def test_a_stream_hardly_notices_prompts_and_these_take_no_longer(known):
    stages = Stages(SMALL, SMALL)
    began, ended = beside_a_stream(stages, 1900, 1900, 1900, known=known)
    gaps = sorted(stages.gaps(0, began))
    assert len(gaps) > 100
    assert gaps[int(0.99 * len(gaps))] <= 0.25
    assert sum(gaps) / len(gaps) > 0.1  # and the time that there is is used
    fixed = Stages(SMALL, SMALL, max_gap=1e9)
    begun, end = beside_a_stream(fixed, 1900, 1900, 1900)
    assert max(fixed.gaps(0, begun)) > 0.8
    per_token = 0.020 / 16  # what reading the weights for smaller chunks costs these stages
    assert ended - began <= 1.05 * (end - begun) + per_token * 5700


def test_a_short_prompt_is_read_beside_long_ones_within_half_a_second():
    stages = Stages(SMALL, SMALL)
    beside_a_stream(stages, 1900)
    for index in range(10, 13):
        stages.submit(index, 1900, 1)
    for _ in range(10):
        stages.advance()
    asked_at = stages.now
    stages.submit(20, 20, 1)
    stages.until(lambda: 20 in stages.heard)
    assert stages.heard[20][0] - asked_at <= 0.5


def test_alone_prompts_are_read_in_the_largest_chunks():
    stages = Stages(SMALL, SMALL)
    stages.submit(0, 1900, 1)
    stages.run()
    assert max(stages.sizes) == 128


def test_what_a_prompt_costs_nothing_beside_others_tells_little_of_what_a_longer_one_does():
    stages = Stages(INT8, INT8, overlapping=True)
    stages.submit(0, 5, 3000)
    stages.until(lambda: len(stages.heard.get(0, ())) > 20)
    for index in range(1, 20):
        stages.submit(index, 12, 1)
        stages.until(lambda index=index: index in stages.heard)
    began = stages.now
    stages.submit(99, 1900, 1)
    stages.until(lambda: 99 in stages.heard)
    assert max(stages.gaps(0, began)) <= 4 * 2 * INT8[0]
    # And no slower than its rows are computed, if they were all that is.
    assert stages.now - began <= 1.15 * 1900 * INT8[1]


def test_generated_tokens_count_as_prompts_do():
    pace = Pace(0.25, 1)
    pace.sent(0, 50, 40, 0.0)
    pace.came(0, (0.1,), 0.1)
    assert pace.num_tokens(128, 0) - pace.num_tokens(128, 30) == 30
    assert pace.num_tokens(128, 128) == LEAST_TOKENS


def test_a_prompt_that_is_short_for_the_stages_is_cut_as_finely_as_costs_nothing():
    stages = Stages(INT8, INT8, overlapping=True)
    for index in (0, 1):
        stages.submit(index, 320, 20)
        stages.run()
    began = stages.now
    stages.submit(2, 320, 1)
    stages.run()
    assert stages.now - began <= 1.2 * 320 * INT8[1]


@pytest.mark.parametrize("is_answering", [True, False])
def test_prompts_keep_far_stages_busy_whether_or_not_anybody_is_answered(is_answering):
    fast = (0.002, 0.0005)
    stages = Stages(fast, fast, apart=0.08)
    for index in (98, 99):
        stages.submit(index, 300, 20)
        stages.run()
    if is_answering:
        stages.submit(0, 5, 3000)
        stages.until(lambda: len(stages.heard.get(0, ())) > 20)
    began = stages.now
    stages.submit(1, 4000, 1)
    stages.until(lambda: 1 in stages.heard)
    # Fixed chunks of 128, one on its way to each stage, take 4000 / 256 ways of 0.24 s and more.
    assert stages.now - began <= 0.6 * 4000 / 128 / 2 * (0.24 + 2 * 0.066)


def test_the_slowest_stage_counts_wherever_it_is():
    sizes = []
    for speeds in ((SMALL, SMALL), (SMALL, (0.03, 0.008)), ((0.03, 0.008), SMALL)):
        stages = Stages(*speeds)
        began, _ = beside_a_stream(stages, 1000)
        assert sorted(stages.gaps(0, began))[-4] <= 0.25
        sizes.append(max(stages.sizes[-20:]))
    assert sizes[0] > sizes[1] == sizes[2] >= LEAST_TOKENS


def test_stages_far_apart_have_more_chunks_under_way_and_prompts_take_no_longer():
    near = beside_a_stream(Stages((0.002, 0.0005), (0.002, 0.0005)), 4000)
    far = Stages((0.002, 0.0005), (0.002, 0.0005), apart=0.08)
    began, ended = beside_a_stream(far, 4000)
    fixed = Stages((0.002, 0.0005), (0.002, 0.0005), apart=0.08, max_gap=1e9)
    begun, end = beside_a_stream(fixed, 4000)
    assert ended - began <= 1.05 * (end - begun)
    assert near[1] - near[0] < ended - began
    assert max(far.gaps(0, began)) <= 4 * far.gaps(0)[10]


def test_four_usual_gaps_are_allowed_where_these_are_long():
    stages = Stages((0.2, 0.01), (0.2, 0.01))
    began, _ = beside_a_stream(stages, 1000)
    gaps = stages.gaps(0, began)
    assert 0.8 < max(gaps) <= 4 * 0.42


def test_no_chunk_is_larger_than_it_may_be():
    stages = Stages((0.001, 0.00001), (0.001, 0.00001), chunk_tokens=64)
    beside_a_stream(stages, 2000)
    assert max(stages.sizes) == 64


def test_where_nothing_is_told_of_steps_chunks_are_as_large_as_they_may_be():
    pace = Pace(0.25, 2)
    pace.sent(0, 100, 100, 0.0)
    pace.came(0, (), 9.0)
    assert pace.num_tokens(128, 1) == 128
    assert pace.num_steps(128) == 2


def test_of_prompts_nothing_is_known_at_first():
    pace = Pace(0.25, 2)
    pace.sent(0, 1, 0, 0.0)
    pace.came(0, (0.01, 0.01), 0.02)
    assert pace.num_tokens(128, 1) == FIRST_TOKENS
    assert pace.num_tokens(16, 1) == 16


def test_what_was_lost_tells_nothing():
    pace = Pace(0.25, 2)
    pace.sent(0, 1, 0, 0.0)
    pace.forget()
    pace.came(0, (5.0, 5.0), 10.0)
    assert pace.target == 0.25


def test_however_far_stages_are_no_more_is_under_way_than_they_can_hold():
    pace = Pace(0.25, 2)
    for number, num_read in enumerate((0, 64)):
        pace.sent(number, num_read + 1, num_read, 10.0 * number)
        pace.came(number, (0.001, 0.001), 10.0 * number + 9.0)
    assert pace.num_steps(16) == MOST_STEPS * 2
