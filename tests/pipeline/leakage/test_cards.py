"""What the package carries of each mode, and that nothing is used without it."""

import json
from pathlib import Path

import pytest

from pipeline.errors import InputError, PolicyError
from pipeline.leakage import cards
from pipeline.leakage.cards import load_card, markdown_table, parse_card, require_card
from pipeline.leakage.modes import MODES


@pytest.mark.parametrize("name", MODES)
def test_every_mode_has_the_card_of_its_version(name):
    mode = MODES[name]
    card = load_card(name, mode.version)
    assert card.protects == mode.protects
    assert card.integrity.lying_server == mode.lying_server
    assert card.setting == mode.setting
    assert [each.sigma for each in card.settings] == list(mode.sigmas)
    layers = {each.layer for each in card.recoveries}
    assert layers == {0, 1, 15, 29} if mode.is_offered else 0 in layers


def test_masks_leave_a_server_at_chance_level_and_words_as_random_as_any():
    card = load_card("offload", MODES["offload"].version)
    for each in card.recoveries:
        assert each.token_recovery <= 2 / each.tokens, each.attack  # of 49,152 there are
    assert card.uniformity is not None
    assert 1e-6 < card.uniformity.p_value < 1 - 1e-6
    assert card.utility.max_logit_difference <= 0.05
    assert card.utility.greedy_agreement >= 0.99


@pytest.mark.parametrize("name", [name for name in MODES if name not in {"dp", "offload"}])
def test_layer_0_tells_nearly_every_token(name):
    best = load_card(name, MODES[name].version).at(0)
    assert best is not None
    assert best.token_recovery >= 0.9


def test_a_card_of_another_version_is_none():
    with pytest.raises(PolicyError, match=r"version 1 of plain, this is version 2: measure it"):
        load_card("plain", 2)


def test_a_mode_without_a_card_is_refused(monkeypatch, tmp_path):
    (tmp_path / "cards").mkdir()
    monkeypatch.setattr(cards, "files", lambda package: tmp_path)
    with pytest.raises(PolicyError, match="mode rotate has no leakage card"):
        require_card("rotate")


def test_a_target_of_attacks_and_an_unknown_mode_are_refused():
    with pytest.raises(PolicyError, match="permute is what attacks are tried on"):
        require_card("permute")
    with pytest.raises(InputError, match="no mode is called 'none'; use plain"):
        require_card("none")
    assert require_card("client").mode == "client"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 0}, "here: version: "),
        ({"recoveries": []}, "here: recoveries: "),
        ({"extra": 1}, "here: extra: "),
        ({"protects": None}, "here: protects: "),
    ],
)
def test_a_damaged_card_is_one_line(change, words):
    fields = json.loads(load_card("plain", 1).model_dump_json()) | change
    with pytest.raises(PolicyError, match=words) as caught:
        parse_card(json.dumps(fields), "here")
    assert "\n" not in str(caught.value)
    with pytest.raises(PolicyError, match="here: the card: "):
        parse_card("{", "here")


def test_the_table_has_a_row_for_each_mode():
    lines = markdown_table().splitlines()
    assert len(lines) == 2 + len(MODES)
    assert len({line.count("|") for line in lines}) == 1
    for line, name in zip(lines[2:], MODES, strict=True):
        assert line.startswith(f"| {name}")


ROOT = Path(__file__).resolve().parents[3]


def table_rows(path, first):
    """Cells of the table rows whose first cell begins so."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return [cells for cells in found if cells[0].startswith(first)]


@pytest.mark.parametrize(
    ("row", "modes"),
    [
        ("plain, client-held ends", ["plain", "client", "rotate"]),
        ("rotated shards, int8", ["rotate-int8"]),
        ("noise of sigma 0.03", ["dp"]),
        ("keys and values held encoded", ["scx", "scx-paper"]),
    ],
)
def test_the_readme_says_what_the_cards_say(row, modes):
    ((_, recovered, price),) = table_rows("README.md", row)
    for mode in modes:
        card = load_card(mode, MODES[mode].version)
        best = [card.at(layer) for layer in (0, 1, 15, 29)]
        rates = ", ".join(f"{100 * each.token_recovery:.0f}" for each in best if each is not None)
        assert f"{rates} %" == recovered
        agreement = card.utility.greedy_agreement
        assert agreement == 1 or f"{agreement:.1%}".replace("%", " %") in price


def test_the_readme_says_what_masks_leave_and_cost():
    ((_, recovered, price),) = table_rows("README.md", "linears under one-time masks")
    card = load_card("offload", MODES["offload"].version)
    best = card.at(0)
    assert best is not None
    assert recovered.startswith(f"{100 * best.token_recovery:.0f} %")
    assert f"{card.cost.bytes_per_token / 1e6:.0f} MB" in price
    assert f"{card.cost.round_trips_per_token} round trips" in price


def test_the_table_of_noise_names_the_strongest_attack_of_the_card():
    card = load_card("dp", MODES["dp"].version)
    for setting in card.settings:
        ((_, agreement, found),) = table_rows("pipeline/codecs/README.md", f"{setting.sigma:g}")
        rate = setting.token_recovery
        share = "all" if rate == 1 else f"{100 * rate:.0f} %"
        assert found.startswith(f"{share}, by {setting.attack}")
        assert agreement.startswith(f"{100 * setting.greedy_agreement:.0f} %")
