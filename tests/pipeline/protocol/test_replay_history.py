import random

import pytest

from pipeline.protocol.replay_history import SlotPart, replay_headers, truncate


def test_truncating_cuts_the_piece_that_the_length_lies_in():
    pieces = [SlotPart(1, 0, 0, 4), SlotPart(2, 1, 4, 4), SlotPart(3, 0, 8, 1)]
    truncate(pieces, 6)
    assert pieces == [SlotPart(1, 0, 0, 4), SlotPart(2, 1, 4, 2)]
    truncate(pieces, 0)
    assert pieces == []


@pytest.mark.parametrize("seed", range(20))
def test_what_was_copied_is_replayed_in_steps_that_fit_and_in_order(seed):
    """Also where a replay has been replayed from, and a slot's parts share a step's number."""
    rng = random.Random(seed)
    most = rng.randint(1, 9)
    slots = {slot: [SlotPart(rng.randint(3, 4), slot, 0, rng.randint(1, 30))] for slot in range(4)}
    for _ in range(2):
        headers = list(replay_headers(slots, 1, most))
        held, again = dict.fromkeys(slots, 0), {slot: [] for slot in slots}
        for header in headers:
            assert header.num_tokens <= most
            assert len({segment.slot for segment in header.segments}) == len(header.segments)
            for index, (slot, position, count) in enumerate(header.segments):
                assert position == held[slot]
                held[slot] += count
                again[slot].append(SlotPart(header.step, index, position, count))
        assert held == {slot: pieces[-1].end for slot, pieces in slots.items()}
        slots = again
