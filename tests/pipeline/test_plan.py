import itertools
import random

import pytest

from pipeline.errors import InputError
from pipeline.plan import split_layers


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
