"""A client that asks for a lot does not slow another down beyond its share."""

from collections import Counter

import pytest

from tests.pipeline.engine.timed_stages import Stages

# Of two stages of a model of three billion parameters, a core each: a row among others is cheap.
SPEED = (0.014, 0.0063)
LOT, LITTLE = b"lot", b"little"


def seconds_for(stages, request_id, num_tokens=200):
    asked_at = stages.now
    stages.submit(request_id, 20, num_tokens, client=LITTLE)
    stages.until(lambda: len(stages.heard.get(request_id, ())) == num_tokens)
    return stages.now - asked_at


def test_who_has_one_request_gets_a_third_of_what_it_has_alone_beside_thirty():
    alone = seconds_for(Stages(SPEED, SPEED), 1)
    stages = Stages(SPEED, SPEED)
    for index in range(100, 130):
        stages.submit(index, 20, 5000, client=LOT)
    stages.until(lambda: len(stages.heard) >= 16)
    # Again and again: it is no matter of luck with a slot.
    assert max(seconds_for(stages, index) for index in range(4)) <= 3 * alone


def test_who_asks_for_a_lot_gets_all_of_it_while_nobody_else_does():
    stages, nobody = Stages(SPEED, SPEED), Stages(SPEED, SPEED)
    for index in range(30):
        stages.submit(index, 20, 100, client=LOT)
        nobody.submit(index, 20, 100)
    stages.run()
    nobody.run()
    assert stages.now == nobody.now
    assert stages.scheduler.roster.num_given_way == 0


@pytest.mark.parametrize("num_clients", [2, 3, 5])
def test_slots_are_shared_out_equally_whoever_came_first(num_clients):
    stages = Stages(SPEED, SPEED, num_slots=15)
    for index in range(40):
        stages.submit(index, 5, 10_000, client=b"0")
    stages.until(lambda: len(stages.heard) == 15)
    for client in range(1, num_clients):
        for index in range(40):
            stages.submit(100 * client + index, 5, 10_000, client=b"%d" % client)
    began = stages.now
    stages.until(lambda: stages.now > began + 60)
    heard = Counter()
    for request_id, times in stages.heard.items():
        heard[request_id // 100] += sum(at > began + 20 for at in times)
    assert min(heard.values()) >= 0.8 * max(heard.values())
    assert len(heard) == num_clients


def test_everybody_ends_whose_requests_give_way():
    stages = Stages(SPEED, SPEED, num_slots=4)
    assert stages.scheduler.use_pool(300)
    for index in range(24):
        stages.submit(index, 10, 60, client=b"%d" % (index % 5 % 3))
    stages.run()
    assert {len(times) for times in stages.heard.values()} == {60}
    assert len(stages.heard) == 24
