"""Questions and answers between a stage and its linear worker, as they are on the wire."""

import struct

import numpy as np
import pytest

from pipeline.errors import PartRefused
from pipeline.offload import linear_wire
from pipeline.offload.linear_parts import LinearParts
from pipeline.offload.linear_wire import question, rows_a_question, rows_untrusted
from pipeline.offload.linear_worker import LinearWorker
from pipeline.remote_parts.wire import PartRefusal, to_array, to_tensor


class NearLink:
    """A link whose far end is in this process."""

    def __init__(self, handler):
        self.num_asked = 0
        self._handler = handler

    def ask(self, header, tensors=()):
        self.num_asked += 1
        return self._handler(header, tensors)


@pytest.fixture
def worker(held):
    return LinearWorker(held)


def parts_over(handler):
    parts = LinearParts()
    parts._link = NearLink(handler)
    return parts


def words(*shape):
    return np.random.default_rng(0).integers(0, 2**64, shape, np.uint64)


def test_a_worker_multiplies_by_the_weights_it_is_told(held, worker):
    for index, linear in enumerate(held):
        rows = words(3, linear.num_in)
        header, (answer,) = worker.answer(*question(index, rows))
        assert header == b""
        assert (to_array(answer) == linear.product(rows)).all()


@pytest.mark.parametrize(
    ("header", "tensors", "problem"),
    [
        (b"", (words(1, 64),), "names one linear"),
        (b"12345", (words(1, 64),), "names one linear"),
        (struct.pack("<I", 16), (words(1, 64),), "16 linears here, none is 16"),
        (struct.pack("<I", 2**32 - 1), (words(1, 64),), "none is 4294967295"),
        (struct.pack("<I", 0), (), "64-bit words"),
        (struct.pack("<I", 0), (words(1, 64), words(1, 64)), "64-bit words"),
        (struct.pack("<I", 0), (words(64),), "64-bit words"),
        (struct.pack("<I", 0), (words(1, 1, 64),), "64-bit words"),
        (struct.pack("<I", 0), (words(1, 64).view(np.int64),), "64-bit words"),
        (struct.pack("<I", 0), (words(1, 63),), "takes rows of 64, these have 63"),
    ],
)
def test_a_question_for_no_product_is_refused(worker, header, tensors, problem):
    with pytest.raises(PartRefusal, match=problem):
        worker.answer(header, tuple(map(to_tensor, tensors)))


def test_many_rows_are_asked_for_piece_by_piece(held, worker, monkeypatch):
    linear = held[2]
    monkeypatch.setattr(linear_wire, "MAX_BYTES", 5 * 8 * max(linear.num_in, linear.num_out))
    assert rows_a_question(linear.num_in, linear.num_out) == 5
    parts, rows = parts_over(worker.answer), words(12, linear.num_in)
    assert (parts.multiply(2, rows, linear.num_out) == linear.product(rows)).all()
    assert parts.link.num_asked == 3


@pytest.mark.parametrize("answer", [(), (words(4).astype(np.float64),), (words(2, 2), words(1, 1))])
def test_an_answer_that_is_none_is_refused_for_good(answer):
    parts = parts_over(lambda header, tensors: (b"", tuple(map(to_tensor, answer))))
    with pytest.raises(PartRefused, match="linear worker is none"):
        parts.multiply(0, words(1, 64), 128)


def test_a_row_wider_than_a_frame_still_goes_alone():
    assert rows_a_question(1 << 22, 8) == 1
    assert rows_untrusted((to_tensor(words(2, 3)),)).shape == (2, 3)
