"""A model whose linears somebody else computes, under masks: the same text, or one clear error."""

from contextlib import closing

import numpy as np
import pytest

from pipeline.kernels.base import LinearSpec
from pipeline.models.config import load_config
from pipeline.models.layer_parts import OWN, LayerParts
from pipeline.models.registry import load_shard
from pipeline.offload.errors import MasksSpent, OtherMasks, WrongProduct
from pipeline.offload.masked_linear import MaskedLinears
from pipeline.offload.masks import open_masks
from pipeline.offload.ring_linear import HEAD, HeldParts
from pipeline.protocol.batch import Segment

PROMPT = np.arange(100, 112)


class MaskedParts(LayerParts):
    are_recordable = False

    def __init__(self, masks, multiply):
        self._linears = MaskedLinears(masks, multiply)

    def linear(self, name, spec, kernels):
        return kernels.linear(spec) if name == HEAD else self._linears.make(name, spec, kernels)


def load(model_dir, parts):
    config = load_config(model_dir)
    return load_shard(model_dir, config, 0, config.num_layers, parts=parts, expected_hashes=None)


def run(shard, prompt=PROMPT, num_steps=4):
    """Logits of a prompt's last row and of some steps behind it."""
    cache = shard.new_cache(1, 64)
    rows, found = prompt, []
    for _ in range(num_steps):
        hidden = shard.forward(rows, (Segment(0, cache.lengths[0], len(rows)),), cache)
        (token,), logits = shard.results(hidden[-1:])
        found.append(logits[0].copy())
        rows = np.array([token])
    return np.stack(found)


def test_the_model_predicts_what_it_does_plainly(tiny_model, mask_file, multiply):
    plain = run(load(tiny_model, OWN))
    with closing(open_masks(mask_file)) as masks:
        masked = run(load(tiny_model, MaskedParts(masks, multiply)))
    assert np.abs(masked - plain).max() < 1e-4
    assert (masked.argmax(axis=1) == plain.argmax(axis=1)).all()


def test_masks_change_no_bit_of_what_comes_out(tiny_model, mask_file, multiply):
    with closing(open_masks(mask_file)) as masks:
        masked = run(load(tiny_model, MaskedParts(masks, multiply)))
    assert (masked == run(load(tiny_model, HeldParts()))).all()


def test_each_layer_asks_four_times_and_each_row_uses_one_mask(tiny_model, mask_file, multiply):
    asked = []

    def ask(index, rows, num_out):
        asked.append((index, len(rows)))
        return multiply(index, rows, num_out)

    with closing(open_masks(mask_file)) as masks:
        left = masks.num_left
        run(load(tiny_model, MaskedParts(masks, ask)), num_steps=2)
        assert left - masks.num_left == len(PROMPT) + 1
    assert asked == [(index, count) for count in (len(PROMPT), 1) for index in range(4 * 4)]


def lazy():
    """Answers what it answered first, as long as that has the shape."""
    answers = {}

    def answer(index, rows, right):
        return answers.setdefault((index, len(rows)), right)

    return answer


def shifted(index, rows, right):
    return right + np.uint64(1 << 63)


def short(index, rows, right):
    return right[:-1]


def of_another_width(index, rows, right):
    return np.ascontiguousarray(right[:, :-1])


@pytest.mark.parametrize("wrong", [lazy(), shifted, short, of_another_width])
def test_a_wrong_answer_ends_the_step_and_nothing_comes_out(tiny_model, mask_file, multiply, wrong):
    cheats = False

    def ask(index, rows, num_out):
        right = multiply(index, rows, num_out)
        return wrong(index, rows, right) if cheats or wrong is not shifted else right

    with closing(open_masks(mask_file)) as masks:
        shard = load(tiny_model, MaskedParts(masks, ask))
        if wrong is shifted:
            run(shard, num_steps=1)
            cheats = True
        with pytest.raises(WrongProduct, match=r"layers\.\d\.\S+_proj is wrong, and was not used"):
            run(shard)


def test_after_a_failure_the_same_tokens_give_the_same_text(tiny_model, mask_file, multiply):
    failures = iter([False] * 5 + [True])

    def ask(index, rows, num_out):
        if next(failures, False):
            raise ConnectionError
        return multiply(index, rows, num_out)

    with closing(open_masks(mask_file)) as masks:
        shard = load(tiny_model, MaskedParts(masks, ask))
        with pytest.raises(ConnectionError):
            run(shard, num_steps=1)
        # what had been sent was hidden under masks of its own
        again = run(shard, num_steps=1)
        assert (again == run(load(tiny_model, HeldParts()), num_steps=1)).all()
        with pytest.raises(MasksSpent):
            run(shard, num_steps=1)


def test_masks_of_another_model_are_refused(tiny_model, held, mask_file, multiply):
    with closing(open_masks(mask_file)) as masks:
        other = LinearSpec(64, 63, bias=False, precision="float32")
        with pytest.raises(OtherMasks, match="another model"):
            MaskedLinears(masks, multiply).make(held[0].name, other, None)
