import pytest

from pipeline.protocol.replay import SlotPart, plan_replay, truncate


@pytest.mark.parametrize(
    ("lost", "keepers", "rebuilt", "sources"),
    [
        (set(), {0, 1, 2}, set(), {}),
        ({0}, {1, 2}, {0}, {-1: 0}),
        ({1}, {0, 2}, {1}, {0: 1}),
        ({3}, {0, 1, 2}, {3}, {2: 3}),
        ({1, 2}, {0}, {1, 2}, {0: 2}),
        ({0, 2}, {1}, {0, 2}, {-1: 0, 1: 2}),
        ({0, 1, 2, 3}, set(), {0, 1, 2, 3}, {-1: 3}),
        # Whoever has kept nothing is rebuilt too, in the end by the orchestrator.
        ({2}, {0}, {1, 2}, {0: 2}),
        ({2}, set(), {0, 1, 2}, {-1: 2}),
        ({3}, {0, 2}, {3}, {2: 3}),
        ({1, 3}, set(), {0, 1, 2, 3}, {-1: 3}),
    ],
)
def test_only_what_must_be_is_rebuilt_by_the_nearest_who_can(lost, keepers, rebuilt, sources):
    plan = plan_replay(lost, keepers)
    assert plan.rebuilt == rebuilt
    assert plan.sources == sources


def test_truncating_cuts_the_piece_that_the_length_lies_in():
    pieces = [SlotPart(1, 0, 0, 4), SlotPart(2, 1, 4, 4), SlotPart(3, 0, 8, 1)]
    truncate(pieces, 6)
    assert pieces == [SlotPart(1, 0, 0, 4), SlotPart(2, 1, 4, 2)]
    truncate(pieces, 0)
    assert pieces == []
