"""A window is a function of positions alone; what cannot be one is refused."""

import pytest

from pipeline.errors import InputError
from pipeline.protocol.tide_window import TideWindow

WINDOWS = [TideWindow(2, 0), TideWindow(6, 4), TideWindow(40, 4), TideWindow(64, 0)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pieces_end_where_rows_are_dropped_wherever_they_begin(window):
    end = 4 * window.size
    edges, position = set(), 0
    for count in window.pieces(0, end):
        position += count
        edges.add(position)
    for start in range(end):
        at, found = start, set()
        for count in window.pieces(start, end - start):
            at += count
            found.add(at)
        assert found == {edge for edge in edges if edge > start}


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_slot_goes_back_to_its_last_drop_and_no_further(window):
    last_drop = 0
    for held in range(1, 4 * window.size):
        if held > window.size and (held - 1 - window.size) % window.num_dropped == 0:
            last_drop = held - 1  # rows went so that this token could come
        kept = {length for length in range(1, held + 1) if window.keeps(length, held)}
        assert kept == set(range(max(last_drop, 1), held + 1))
        assert window.keeps(0, held)


@pytest.mark.parametrize(("size", "sinks"), [(5, 4), (0, 0), (1, 0), (-3, 0), (8, -1)])
def test_what_keeps_nothing_or_drops_nothing_is_no_window(size, sinks):
    with pytest.raises(InputError, match="window"):
        TideWindow(size, sinks)
