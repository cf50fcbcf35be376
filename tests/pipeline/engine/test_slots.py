"""What stages are to do to slots is done in the order in which it was said."""

import random

import pytest

from pipeline.engine.slots import Order, Slots


def all_orders(slots):
    found = []
    while slots.is_dirty:
        found.append(slots.next_orders())
    return found


def test_what_is_forgotten_together_goes_in_one_step_and_only_the_ended_are_freed():
    slots = Slots(3)
    slots.take_back(0, 5)
    slots.end(1)
    assert all_orders(slots) == [(Order(0, 5), Order(1, 0, frees=True))]
    assert not slots.is_dirty


def test_less_to_keep_takes_the_place_of_more():
    slots = Slots(3)
    slots.take_back(0, 5)
    slots.take_back(0, 3)
    slots.end(0)
    assert all_orders(slots) == [(Order(0, 0, frees=True),)]


def test_a_source_is_copied_before_it_is_cleared_and_a_target_cleared_before_it_is_written():
    slots = Slots(4)
    slots.take_back(1, 0)
    slots.copy(0, 1, 9)
    slots.end(0)
    slots.copy(2, 0, 7)
    slots.take_back(2, 3)
    assert all_orders(slots) == [
        (Order(1, 0),),
        (Order(1, 9, 0),),
        (Order(0, 0, frees=True),),
        (Order(0, 7, 2),),
        (Order(2, 3),),
    ]


def test_what_was_to_be_kept_before_a_copy_is_not_forgotten_behind_it():
    slots = Slots(3)
    slots.take_back(0, 9)
    slots.copy(0, 1, 9)
    slots.take_back(0, 2)
    assert all_orders(slots) == [(Order(0, 9),), (Order(1, 9, 0),), (Order(0, 2),)]


@pytest.mark.parametrize("seed", range(20))
def test_slots_hold_what_they_would_if_each_word_were_done_at_once(seed):
    rng = random.Random(seed)
    slots, model, stage = Slots(5), [[i] * 20 for i in range(5)], [[i] * 20 for i in range(5)]
    for _ in range(200):
        slot, other = rng.sample(range(5), 2)
        length = rng.randint(0, len(model[slot]))
        if rng.random() < 0.5:
            slots.take_back(slot, length)
            del model[slot][length:]
        elif not model[other] and length:
            slots.copy(slot, other, length)
            model[other] = model[slot][:length]
        elif not any(model):
            break
        if rng.random() < 0.2:
            apply(slots.next_orders(), stage)
    for orders in all_orders(slots):
        apply(orders, stage)
    assert stage == model


def apply(orders, stage):
    assert len({order.slot for order in orders}) == len(orders)
    assert len({order.source is None for order in orders}) <= 1
    for order in orders:
        if order.source is None:
            assert len(stage[order.slot]) >= order.length
            del stage[order.slot][order.length :]
        else:
            assert not stage[order.slot]
            assert len(stage[order.source]) >= order.length
            stage[order.slot] = stage[order.source][: order.length]
