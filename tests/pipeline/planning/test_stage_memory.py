"""Whether planned stages fit their machines."""

from dataclasses import replace

import pytest

from pipeline.models.config import load_config
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.stage_memory import USABLE_SHARE, stage_memory

TWO = PlanOptions(num_stages=2, hosts=("a", "b"))


def needs(model_dir, options, machines):
    return stage_memory(plan(model_dir, options), model_dir, "float32", machines)


def test_what_weights_leave_of_a_machine_is_for_keys_and_values(tiny_model):
    config = load_config(tiny_model)
    for stage in needs(tiny_model, TWO, {0: 1 << 30, 1: 2 << 30}):
        usable = int(USABLE_SHARE * ((stage.stage_idx + 1) << 30))
        assert stage.weight_bytes + stage.kv_bytes == usable
        assert stage.missing_bytes == 0
        assert stage.num_tokens == stage.kv_bytes // stage.token_bytes
    layers = config.num_layers
    tokens = [each.token_bytes for each in needs(tiny_model, TWO, {})]
    assert sum(tokens) == 2 * 4 * layers * config.num_kv_heads * config.head_dim


def test_stages_of_one_host_share_its_memory(tiny_model):
    apart = needs(tiny_model, TWO, {0: 1 << 30, 1: 1 << 30})
    together = needs(tiny_model, replace(TWO, hosts=("a",)), {0: 1 << 30, 1: 1 << 30})
    weights = sum(each.weight_bytes for each in apart)
    for stage in together:
        assert stage.kv_bytes == (int(USABLE_SHARE * (1 << 30)) - weights) // 2


def test_memory_set_aside_is_what_a_stage_gets_and_others_do_not(tiny_model):
    options = replace(TWO, kv_bytes=1 << 20)
    for stage in needs(tiny_model, options, {}):
        assert stage.kv_bytes == 1 << 20
    small = needs(tiny_model, options, {0: 1 << 20, 1: 1 << 30})
    assert small[0].missing_bytes > 0
    assert small[1].missing_bytes == 0


def test_a_machine_that_is_too_small_is_told_of_by_what_it_lacks(tiny_model):
    stage = needs(tiny_model, TWO, {0: 1000})[0]
    assert stage.missing_bytes == stage.weight_bytes - int(USABLE_SHARE * 1000)
    assert stage.kv_bytes == 0
    assert f"{stage.missing_bytes / 1e6:.2g} MB too small" in stage.told(64)
    assert "its machine is 2.5 GB too small" in stage._replace(missing_bytes=25 * 10**8).told(64)


@pytest.mark.parametrize(("context", "is_short"), [(1, False), (1 << 40, True)])
def test_room_for_less_than_one_request_is_said(tiny_model, context, is_short):
    stage = needs(tiny_model, TWO, {0: 1 << 30})[0]
    assert ("fewer than" in stage.told(context)) == is_short


def test_weights_are_those_of_the_planned_precision(tiny_model):
    floats = needs(tiny_model, TWO, {})
    halves = needs(tiny_model, replace(TWO, precision="bfloat16"), {})
    for a, b in zip(floats, halves, strict=True):
        assert b.weight_bytes == pytest.approx(a.weight_bytes / 2, rel=0.05)


def test_of_a_machine_nobody_knows_only_the_weights_are_told(tiny_model):
    stage = needs(tiny_model, TWO, {})[0]
    assert stage.num_tokens is None
    assert stage.told(64).endswith("of weights")
