"""What a stranger that holds encoded rows does with what it is asked: nothing without sense."""

import numpy as np
import pytest

from pipeline.remote_parts.wire import PartRefusal, to_tensor
from pipeline.scx.attention_wire import Op, Opening, Span, attend_bytes, opening_bytes, pair_bytes
from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker

OPENING = Opening(2, 2, 16, 2, 8)


@pytest.fixture
def worker():
    found = AttentionWorker(AttentionMemory(None))
    found.answer(opening_bytes(OPENING), ())
    return found


def rows_of(count, num_heads=2, width=16, dtype=np.float32):
    return to_tensor(np.ones((num_heads, count, width), dtype))


DOUBLES = rows_of(1, dtype=np.float64)


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        (b"", ()),
        (b"\x09", ()),
        (opening_bytes(OPENING), ()),
        (opening_bytes(OPENING)[:-1], ()),
        (attend_bytes(0, [Span(0, 0, 2, 1, (2,))])[:-1], (rows_of(2), rows_of(2), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (2,))])[:-5], (rows_of(2), rows_of(2), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (2,))]) + b"0", (rows_of(2), rows_of(2), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (2,))]), (rows_of(2), rows_of(2))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (2,))]), (rows_of(2), rows_of(3), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (2,))]), (rows_of(2, 3), rows_of(2, 3), rows_of(1, 3))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (3,))]), (rows_of(2), rows_of(2), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (2, 1))]), (rows_of(2), rows_of(2), rows_of(2))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (1, 1))]), (rows_of(2), rows_of(2), rows_of(2))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (0, 2))]), (rows_of(2), rows_of(2), rows_of(2))),
        (attend_bytes(0, [Span(0, 0, 2, 1, (1, 2))]), (rows_of(2), rows_of(2), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 0, 1, ())]), (rows_of(0), rows_of(0), rows_of(0))),
        (attend_bytes(0, [Span(0, 1, 1, 1, (1,))]), (rows_of(1), rows_of(1), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 9, 1, (9,))]), (rows_of(9), rows_of(9), rows_of(1))),
        (attend_bytes(0, [Span(2, 0, 1, 1, (1,))]), (rows_of(1), rows_of(1), rows_of(1))),
        (attend_bytes(2, [Span(0, 0, 1, 1, (1,))]), (rows_of(1), rows_of(1), rows_of(1))),
        (attend_bytes(0, [Span(0, 0, 1, 0)]), (DOUBLES, DOUBLES, rows_of(0))),
        (pair_bytes(Op.TRUNCATE, 0, 1), ()),
        (pair_bytes(Op.FETCH, 2, 0), ()),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(worker, header, tensors):
    with pytest.raises(PartRefusal, match="makes no sense"):
        worker.answer(header, tensors)


def test_nothing_is_held_before_a_session_is_opened():
    asked = attend_bytes(0, [Span(0, 0, 1, 0)])
    with pytest.raises(PartRefusal, match="not been opened"):
        AttentionWorker(AttentionMemory(None)).answer(asked, (rows_of(1), rows_of(1), rows_of(0)))


def test_sessions_together_take_no_more_than_is_given():
    memory = AttentionMemory(OPENING.num_bytes)
    first, second = AttentionWorker(memory), AttentionWorker(memory)
    first.answer(opening_bytes(OPENING), ())
    with pytest.raises(PartRefusal, match="--context or --max-batch"):
        second.answer(opening_bytes(OPENING), ())
    first.close()
    second.answer(opening_bytes(OPENING), ())
    second.close()
    second.close()
