import itertools
import random
import shutil

import pytest

from pipeline.errors import InputError, ManifestError
from pipeline.planning.plan import PlanOptions, plan, split_layers


def heaviest(first, layers, last, ends):
    starts = [0, *ends[:-1]]
    sizes = [sum(layers[a:b]) for a, b in zip(starts, ends, strict=True)]
    sizes[0] += first
    sizes[-1] += last
    return max(sizes)


def test_the_heaviest_stage_is_as_light_as_any_split_makes_it():
    rng = random.Random(5)
    for _ in range(60):
        count = rng.randint(1, 9)
        layers = [rng.randint(1, 50) for _ in range(count)]
        first, last = rng.randint(0, 100), rng.randint(0, 100)
        stages = rng.randint(1, count)
        ends = split_layers(first, layers, last, stages)
        assert len(ends) == stages
        assert ends[-1] == count
        assert ends == sorted(set(ends))
        best = min(
            heaviest(first, layers, last, [*cuts, count])
            for cuts in itertools.combinations(range(1, count), stages - 1)
        )
        assert heaviest(first, layers, last, ends) == best


@pytest.mark.parametrize("stages", [0, 5])
def test_a_split_into_no_or_too_many_stages_is_refused(stages):
    with pytest.raises(InputError, match="choose 1 to 4"):
        split_layers(0, [1, 1, 1, 1], 0, stages)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (PlanOptions(2, base_port=65535), "65536"),
        (PlanOptions(2, hosts=("a b",)), "'a b'"),
        (PlanOptions(2, hosts=("",)), "':9000'"),
        (PlanOptions(2, orchestrator_keys=("zz",)), "'zz'"),
        (PlanOptions(2, base_port=65535, in_enclaves=True), "65536"),
    ],
)
def test_options_no_manifest_can_hold_are_refused_in_one_line(tiny_model, options, word):
    with pytest.raises(ManifestError, match=word) as caught:
        plan(tiny_model, options)
    assert "\n" not in str(caught.value)


def test_a_directory_whose_name_is_no_text_still_has_a_plan(tiny_model, tmp_path):
    odd = tmp_path / "bad\udcff"
    odd.symlink_to(tiny_model)
    assert plan(tmp_path / odd.name, PlanOptions(1)).total_layers == 4
    moved = tmp_path / "real\udcff"
    shutil.copytree(tiny_model, moved)
    assert plan(moved, PlanOptions(1)).model_name == "real?"


def addresses(manifest):
    return [
        tuple(getattr(stage.endpoint, name).addr for name in ("control", "data_in", "data_out"))
        for stage in manifest.stages
    ]


@pytest.mark.parametrize(
    ("hosts", "results"), [(("a", "b", "::1"), "[::1]"), (("a", "b", "::1", "user"), "user")]
)
def test_each_stage_may_have_its_host_and_the_orchestrator_its_own(tiny_model, hosts, results):
    assert addresses(plan(tiny_model, PlanOptions(3, hosts))) == [
        ("a:9000", "a:9001", "b:9011"),
        ("b:9010", "b:9011", "[::1]:9021"),
        ("[::1]:9020", "[::1]:9021", f"{results}:9031"),
    ]


def test_one_host_is_every_ones(tiny_model):
    assert addresses(plan(tiny_model, PlanOptions(2, ("a",)))) == [
        ("a:9000", "a:9001", "a:9011"),
        ("a:9010", "a:9011", "a:9021"),
    ]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (PlanOptions(3, ("a", "b")), "2 hosts are given for 3 stages"),
        (PlanOptions(1, ("a", "b", "c")), "3 hosts are given for 1 stages"),
        (PlanOptions(2, ()), "0 hosts"),
        (PlanOptions(2, ("a", "b"), in_enclaves=True), "one parent"),
    ],
)
def test_hosts_that_do_not_go_with_the_stages_are_refused(tiny_model, options, word):
    with pytest.raises(InputError, match=word):
        plan(tiny_model, options)
