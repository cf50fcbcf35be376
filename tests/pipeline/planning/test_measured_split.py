"""The split follows what was measured: speed, memory and the ways between."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import InputError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.measured_split import (
    HOME,
    MachineSpeed,
    ModelLoad,
    Way,
    load_of,
    split_by_speed,
)
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model

MIB = 1 << 20
NEAR, FAR = Way(1e-4, 1e9), Way(0.05, 1e7)


def machine(speed, memory=1 << 34, name="m", disk=1 << 34):
    return MachineSpeed(name, memory, disk, speed * 1e9, speed * 1e10)


def load(num_layers, layer=MIB, first=0, last=0):
    whole = first + layer * num_layers + last
    return ModelLoad(first, (layer,) * num_layers, last, whole, 4.0, 1.0, 4096)


def all_ways(count, way=NEAR):
    stops = range(HOME, count)
    return {(a, b): way for a in stops for b in stops if a != b}


def shares(split):
    starts = (0, *split.ends[:-1])
    return {m: e - s for m, s, e in zip(split.order, starts, split.ends, strict=True)}


def test_equal_machines_get_equal_shares():
    found = split_by_speed(load(12), [machine(10)] * 3, all_ways(3))
    assert shares(found) == {0: 4, 1: 4, 2: 4}


def test_a_machine_three_times_as_fast_gets_three_times_as_much():
    found = split_by_speed(load(12), [machine(10), machine(30)], all_ways(2))
    assert shares(found) == {0: 3, 1: 9}
    assert max(found.stage_seconds) == pytest.approx(min(found.stage_seconds))


def test_what_does_not_fit_a_fast_machine_goes_to_a_slow_one():
    small = machine(100, memory=4 * MIB)
    assert shares(split_by_speed(load(12), [machine(1), small], all_ways(2))) == {0: 9, 1: 3}


def test_what_does_not_fit_a_fast_machines_disk_goes_to_a_slow_one():
    full = machine(100, disk=3 * MIB)
    assert shares(split_by_speed(load(12), [machine(1), full], all_ways(2))) == {0: 9, 1: 3}
    embedding = load(4, first=8 * MIB)
    found = split_by_speed(embedding, [machine(10), machine(10, disk=5 * MIB)], all_ways(2))
    assert found.order == (0, 1)


def test_each_machine_is_named_whose_disk_has_no_room_with_what_it_needs():
    small = [machine(1, name="alpha", disk=3 * MIB), machine(1, name="beta", disk=6 * MIB)]
    with pytest.raises(InputError) as caught:
        split_by_speed(load(12), small, all_ways(2))
    assert "(alpha needs 6.3 MB and has 3.1 MB free for parts)" in str(caught.value)
    small[1] = machine(1, name="beta", disk=5 * MIB)
    with pytest.raises(InputError, match=r"alpha needs 6\.3 .*; beta needs 6\.3 MB and has 5\.2"):
        split_by_speed(load(12), small, all_ways(2))


def test_the_head_counts_and_the_embedding_takes_memory_alone():
    heavy = load(8, last=4 * MIB)
    found = split_by_speed(heavy, [machine(10), machine(10)], all_ways(2))
    assert found.ends == (6, 8)
    assert split_by_speed(load(8, first=100 * MIB), [machine(10)] * 2, all_ways(2)).ends == (4, 8)


def test_the_order_is_that_of_the_shortest_way():
    ways = all_ways(3, FAR) | {(2, 0): NEAR, (0, 1): NEAR, (1, HOME): NEAR}
    found = split_by_speed(load(9), [machine(10)] * 3, ways)
    assert found.order == (2, 0, 1)
    ways = all_ways(8, FAR) | {(i, i + 1): NEAR for i in range(7)}
    assert split_by_speed(load(8), [machine(10)] * 8, ways).order == tuple(range(8))


def test_ways_that_there_are_not_are_not_taken():
    ways = all_ways(2)
    del ways[0, 1]
    assert split_by_speed(load(4), [machine(10)] * 2, ways).order == (1, 0)
    ways = all_ways(2)
    del ways[HOME, 0]
    assert split_by_speed(load(4), [machine(10)] * 2, ways).order == (1, 0)


def test_what_cannot_be_is_said_in_a_line():
    pair = [machine(1, name="alpha"), machine(1, name="beta")]
    with pytest.raises(InputError, match=r"takes 0\.00 GiB .* choose a smaller --dtype"):
        split_by_speed(load(4), [machine(1, memory=MIB)] * 2, all_ways(2))
    with pytest.raises(InputError, match="more than the model's 1 layers"):
        split_by_speed(load(1), pair, all_ways(2))
    with pytest.raises(InputError, match="fit no split"):
        split_by_speed(
            load(2, layer=10 * MIB), [machine(1, memory=11 * MIB), machine(1)], all_ways(2)
        )
    homeless = {hop: way for hop, way in all_ways(2).items() if hop[1] != HOME}
    with pytest.raises(InputError, match="between no machine and home"):
        split_by_speed(load(4), pair, homeless)
    alone = {hop: way for hop, way in all_ways(2).items() if hop[0] != 0}
    with pytest.raises(InputError, match="alpha reaches none"):
        split_by_speed(load(4), pair, alone)
    unreached = {hop: way for hop, way in all_ways(2).items() if hop[0] != HOME}
    with pytest.raises(InputError, match="no way leads through all"):
        split_by_speed(load(4), pair, unreached)
    apart = {(0, HOME): NEAR, (1, HOME): NEAR}
    with pytest.raises(InputError, match="no way leads through all"):
        split_by_speed(load(4), pair, apart)


def test_the_load_is_that_of_the_plans_precision(tiny_model):
    whole, half, quarter = (load_of(tiny_model, p) for p in ("float32", "bfloat16", "int8"))
    assert len(whole.layer_bytes) == 4
    assert half.layer_bytes[0] == pytest.approx(whole.layer_bytes[0] / 2)
    assert quarter.layer_bytes[0] < half.layer_bytes[0]
    assert whole.row_bytes == 4 * 64


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_load_says_what_parts_take_on_disk_and_in_memory(tmp_path, is_tied, stored, precision):
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, tie_word_embeddings=is_tied,
    )  # fmt: skip
    model_dir = tmp_path / "model"
    LlamaForCausalLM(config).to(getattr(torch, stored)).save_pretrained(model_dir)
    load = load_of(model_dir, precision)
    for ends in ((3,), (1, 3)):
        cut = tmp_path / f"{len(ends)}"
        manifest = plan(model_dir, PlanOptions(len(ends), precision=precision, ends=ends))
        cut_model(manifest, model_dir, cut, precision)
        for index, layers in enumerate(pairwise((0, *ends))):
            part = cut / f"stage{index}"
            tensors = load_file(part / "model.safetensors").values()
            written = sum(each.nbytes for each in tensors)
            assert load.file_bytes(*layers) == pytest.approx(written, rel=0.05)
            shard = load_shard(
                part, load_config(part), *layers, dtype=precision, expected_hashes=None
            )
            assert load.part_bytes(*layers) == pytest.approx(shard.num_weight_bytes, rel=0.1)
