"""What a holder of encoded rows reads from them: attacks that work, and that fail."""

import numpy as np
import pytest

from pipeline.leakage import attention_attacks as attacks
from pipeline.leakage.attention_rows import HeldText, LayerReaders
from pipeline.leakage.encoded_suite import EncodedTexts, recover_encoded
from pipeline.leakage.modes import MODES
from pipeline.protocol.batch import Segment

SEED = bytes(32)


@pytest.fixture(scope="module")
def text(laboratory):
    """Rows of a text at layer 0, what reads them, and what a holder has of them."""
    readers = LayerReaders.load(laboratory.model_dir, laboratory.model.config, 0)
    rows = laboratory.model.embed(laboratory.texts[0])
    return readers, rows, HeldText.encode(readers, rows, SEED, 0)


def test_readers_read_what_a_stage_caches(laboratory, text):
    readers, rows, _ = text
    shard = laboratory.model.shards[0]
    cache = shard.new_cache(1, len(rows))
    batch = [Segment(0, 0, len(rows))]
    shard.forward(rows, batch, cache)
    cached = cache.export(0, range(len(rows)))[0]
    keys = readers.turned(readers.keys_of(rows), np.arange(len(rows)))
    assert np.allclose(keys, cached.keys, atol=1e-4)
    assert np.allclose(readers.values_of(rows), cached.values, atol=1e-4)


def test_lengths_tell_tokens_and_encoded_rows_themselves_do_not(laboratory, text):
    readers, _, held = text
    vocabulary = attacks.Vocabulary.of(readers, laboratory.model.embedding)
    own = laboratory.texts[0]
    (found,) = attacks.by_rows(vocabulary, [held])
    right, count = attacks.share(found, own[: len(found)])
    assert right / count < 0.5
    observed, features = attacks.with_lengths(readers, held)
    tokens = attacks.nearest_rows(observed, features(laboratory.model.embedding))
    assert attacks.share(tokens, own) == (len(own), len(own))


def test_a_prompts_secret_order_is_found_by_phase(laboratory, text):
    readers, _, held = text
    vocabulary = attacks.Vocabulary.of(readers, laboratory.model.embedding)
    found = attacks.in_order_by_phase(vocabulary, held)
    right, count = attacks.share(found, laboratory.texts[0])
    assert right / count > 0.8


@pytest.mark.parametrize("name", ["scx", "scx-paper"])
def test_every_layer_that_is_asked_for_is_attacked(laboratory, name):
    given = EncodedTexts(
        laboratory.model_dir, laboratory.model, laboratory.attacker, laboratory.texts,
        laboratory.scope,
    )  # fmt: skip
    found = recover_encoded(given, MODES[name], (0, 1), None)
    best = {layer: max(e.token_recovery for e in found if e.layer == layer) for layer in (0, 1)}
    assert best[0] == 1
    assert best[1] > 0.5
    assert ("keys-in-hand" in {each.attack for each in found}) == (name == "scx-paper")


def test_a_card_says_what_a_mode_costs(laboratory):
    card = laboratory.card(MODES["scx"], lambda what, unit: None)
    assert card.utility.max_logit_difference < 1e-3
    assert card.cost.round_trips_per_token == laboratory.model.config.num_layers
    assert card.cost.bytes_per_token > 1000
