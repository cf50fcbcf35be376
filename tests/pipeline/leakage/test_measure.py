"""Every mode measured on a tiny random model: what its card says, whatever is attacked."""

import pytest

from pipeline.errors import InputError
from pipeline.leakage.cards import parse_card
from pipeline.leakage.measure import Laboratory
from pipeline.leakage.modes import MODES
from pipeline.leakage.suite import Scope


@pytest.fixture(scope="session")
def card(laboratory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = laboratory.card(MODES[name], lambda what, unit: None)
        return made[name]

    return get


def rates(card):
    return {(each.attack, each.layer): each.token_recovery for each in card.recoveries}


@pytest.mark.parametrize("name", MODES)
def test_a_card_survives_its_json_and_names_its_modes_version(card, name):
    found = card(name)
    assert parse_card(found.model_dump_json(), "here") == found
    assert (found.mode, found.version) == (name, MODES[name].version)
    assert {each.layer for each in found.recoveries} == {0, 1, 2, 3}
    assert all(0 <= each.token_recovery <= 1 for each in found.recoveries)
    assert found.protects.endswith(".")
    assert found.cost.tokens_per_second > 0


@pytest.mark.parametrize("name", ["plain", "client"])
def test_rows_as_they_are_give_every_token_back(card, name):
    assert min(rates(card(name)).values()) == 1


@pytest.mark.parametrize("name", ["permute", "rotate", "rotate-int8"])
def test_a_secret_stops_nearest_rows_and_nobody_who_goes_on(card, name):
    found = rates(card(name))
    assert found["nearest-vocabulary", 0] < 0.2
    assert max(rate for (_, layer), rate in found.items() if layer == 0) >= 0.9
    assert found["known-weights", 1] >= 0.9


def test_sorted_rows_tell_permutations_and_not_rotations(card):
    assert rates(card("permute"))["sorted-matching", 0] == 1
    assert rates(card("rotate"))["sorted-matching", 0] < 0.5


def test_exact_modes_change_no_prediction_and_others_say_how_much(card):
    assert card("plain").utility.max_logit_difference == 0
    assert card("client").utility.max_logit_difference == 0
    assert card("rotate").utility.max_logit_difference < 2e-4
    assert card("rotate").utility.greedy_agreement == 1
    assert card("rotate-int8").utility.max_logit_difference > 1e-3
    assert card("dp").utility.kl > 0


def test_masks_leave_nothing_and_mixing_leaves_the_prompt(card):
    assert max(rates(card("offload")).values()) < 0.2
    assert card("offload").uniformity.p_value > 1e-6
    assert card("offload").utility.greedy_agreement == 1
    assert rates(card("mix"))["row-space-unordered", 0] == 1
    assert card("mix").utility.greedy_agreement == 1


def test_more_noise_hides_more_and_spoils_more(card):
    settings = card("dp").settings
    assert [each.sigma for each in settings] == sorted(each.sigma for each in settings)
    assert settings[-1].token_recovery < 0.5
    assert settings[-1].kl > settings[0].kl


def test_a_narrow_wire_moves_fewer_bytes(card):
    hidden = 64
    assert card("plain").cost.bytes_per_token == 4 * hidden + 8
    assert card("client").cost.bytes_per_token == 3 * 4 * hidden
    assert card("rotate-int8").cost.bytes_per_token == 3 * (hidden + hidden // 8 + 4)


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        (Scope(num_texts=21), "--texts 21: there are 20"),
        (Scope(num_tokens=2000), "--tokens 2000: the shortest text has"),
        (Scope(num_tokens=4000), "--tokens 4000: more than half"),
        (Scope(layers=(0, 4)), "--layers: this model has the layers 0 to 3"),
        (Scope(layers=(-1,)), "--layers"),
    ],
)
def test_a_scope_that_cannot_be_meant(tiny_model, scope, words):
    with pytest.raises(InputError, match=words):
        Laboratory.open(tiny_model, scope, lambda what, unit: None)
