import pytest

from pipeline.orchestrator.replay_plan import plan_replay


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
