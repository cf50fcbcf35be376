import numpy as np
import pytest

from pipeline.protocol.batch import Segment
from pipeline.protocol.step_header import StepKind
from pipeline.stage.activation_log import ActivationLog

WIDTH = 4


@pytest.fixture
def log():
    return ActivationLog(3, 16, WIDTH)


def rows(*numbers):
    return np.array(numbers, dtype=np.float32)[:, None].repeat(WIDTH, axis=1)


def replayed(log):
    return [
        (header.step, [tuple(vars_of(each)) for each in header.segments], hidden[:, 0].tolist())
        for header, hidden in log.replay(2, 64)
    ]


def vars_of(segment):
    return segment.slot, segment.position, segment.num_tokens


def filled(log):
    log.append(5, (Segment(0, 0, 2), Segment(2, 0, 1)), rows(1, 2, 10))
    log.append(6, (Segment(0, 2, 1),), rows(3))
    log.append(8, (Segment(0, 3, 1), Segment(2, 1, 2)), rows(4, 11, 12))
    return log


def test_what_was_sent_comes_back_in_the_same_steps(log):
    assert replayed(filled(log)) == [
        (5, [(0, 0, 2), (2, 0, 1)], [1, 2, 10]),
        (6, [(0, 2, 1)], [3]),
        (8, [(0, 3, 1), (2, 1, 2)], [4, 11, 12]),
    ]
    headers = [header for header, _ in log.replay(2, 64)]
    assert all(header.kind is StepKind.REPLAY and header.until == 2 for header in headers)
    assert all(not any(header.wants) for header in headers)


def test_a_cleared_slot_is_not_replayed_and_nothing_of_it_is_left(log):
    filled(log).clear([0])
    assert replayed(log) == [(5, [(2, 0, 1)], [10]), (8, [(2, 1, 2)], [11, 12])]
    assert not log._rows[0, :4].any()


@pytest.mark.parametrize("length", range(5))
def test_a_truncated_slot_keeps_its_first_tokens_and_can_go_on(log, length):
    filled(log).truncate(0, length)
    mine = [each for _, segments, _ in replayed(log) for each in segments if each[0] == 0]
    assert sum(count for _, _, count in mine) == length
    assert not log._rows[0, length:4].any()
    log.append(9, (Segment(0, length, 1),), rows(77))
    assert replayed(log)[-1] == (9, [(0, length, 1)], [77])


def test_released_memory_is_zeroed_and_given_back(log):
    held = filled(log)._rows
    log.release()
    assert not held[0, :4].any()
    assert not held[2, :3].any()
    assert log.num_bytes == 0


def test_a_copy_is_replayed_though_its_source_is_gone(log):
    filled(log).copy(9, 0, 1, 3)
    log.clear([0, 2])
    assert replayed(log) == [(9, [(1, 0, 3)], [1, 2, 3])]
    log.append(10, (Segment(1, 3, 1),), rows(5))
    assert [hidden[:, 0].tolist() for _, hidden in log.replay(2, 2)] == [[1, 2], [3], [5]]
    log.clear([1])
    assert not log._rows.any()
