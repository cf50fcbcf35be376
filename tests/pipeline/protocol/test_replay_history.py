from pipeline.protocol.replay_history import SlotPart, truncate


def test_truncating_cuts_the_piece_that_the_length_lies_in():
    pieces = [SlotPart(1, 0, 0, 4), SlotPart(2, 1, 4, 4), SlotPart(3, 0, 8, 1)]
    truncate(pieces, 6)
    assert pieces == [SlotPart(1, 0, 0, 4), SlotPart(2, 1, 4, 2)]
    truncate(pieces, 0)
    assert pieces == []
