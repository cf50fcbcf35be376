"""What is lacking where stages cannot be placed."""

import pytest

from pipeline.placement.ray.shortage import GIB, shortage

SMALL = {"CPU": 2.0, "memory": 4.0 * GIB}
NITRO = {**SMALL, "nitro": 1.0}


@pytest.mark.parametrize(
    ("needs", "strategy", "nodes", "free", "said"),
    [
        ({"CPU": 4.0}, "PACK", [SMALL] * 3, {"CPU": 6.0},
         "a stage takes CPU 4 of one node, and the 3 nodes have CPU 2 at most"),
        ({"memory": 6.0 * GIB}, "PACK", [SMALL], SMALL,
         "a stage takes memory 6 GiB of one node, and the 1 nodes have memory 4 GiB at most"),
        ({"CPU": 1.0}, "PACK", [], {},
         "a stage takes CPU 1 of one node, and the 0 nodes have CPU 0 at most"),
        ({"CPU": 1.0, "nitro": 1.0}, "SPREAD", [SMALL] * 3, SMALL,
         "a stage takes CPU 1, nitro 1 of one node, and the 3 nodes have nitro 0 at most"),
        ({"CPU": 1.0, "nitro": 1.0}, "STRICT_SPREAD", [SMALL, SMALL, NITRO], SMALL,
         "STRICT_SPREAD has 3 stages on as many nodes, and 1 of 3 nodes have CPU 1, nitro 1"),
        ({"CPU": 1.0}, "STRICT_PACK", [SMALL] * 3, {"CPU": 6.0},
         "STRICT_PACK has all stages on one node, and none has CPU 3"),
        ({"CPU": 1.0}, "PACK", [SMALL] * 3, {"memory": 1.0},
         "a stage takes CPU 1, and the nodes have CPU 0 left"),
        ({"CPU": 2.0, "memory": 1.0}, "PACK", [{"CPU": 2.0}, {"memory": 1.0}], SMALL,
         "a stage takes CPU 2, memory 9.31e-10 GiB of one node, and no node has all of that"),
        ({"CPU": 1.0}, "STRICT_SPREAD", [SMALL] * 3, {"CPU": 6.0}, None),
    ],
)  # fmt: skip
def test_which_resource_is_lacking_and_how_much(needs, strategy, nodes, free, said):
    assert shortage(needs, 3, strategy, nodes, free) == said


@pytest.mark.parametrize(
    ("free", "num_missing", "said"),
    [
        (4.0, 3, "3 stages take CPU 6, and the nodes have CPU 4 left"),
        (1.0, 1, "a stage takes CPU 2, and the nodes have CPU 1 left"),
        (4.0, 1, None),
        (6.0, 3, None),
    ],
)
def test_stages_are_placed_together_at_first_and_one_by_one_later(free, num_missing, said):
    found = shortage({"CPU": 2.0}, 3, "SPREAD", [SMALL] * 6, {"CPU": free}, num_missing)
    assert found == said
