"""`pipeline-orch leakage`: what it prints, and what it refuses in one line."""

import json
import sys

import pytest

from pipeline.cli import pipeline_orch
from pipeline.cli.leakage import _draw
from pipeline.leakage.cards import load_card
from pipeline.leakage.modes import MODES

SMALL = ("--texts", "2", "--tokens", "10", "--layers", "0,3", "--threads", "1")


@pytest.fixture
def leakage(tiny_model, monkeypatch, capfd):
    """Runs the command: its exit code, stdout and stderr. MODEL stands for the tiny model."""

    def run(*arguments):
        words = [str(tiny_model) if word == "MODEL" else str(word) for word in arguments]
        monkeypatch.setattr(sys, "argv", ["pipeline-orch", "leakage", *words])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        return caught.value.code, *capfd.readouterr()

    return run


def test_json_gives_a_rate_for_each_attack_and_layer(leakage):
    code, out, err = leakage("--mode", "permute", "--model-dir", "MODEL", "--json", *SMALL)
    assert (code, err) == (0, "")
    card = json.loads(out)
    assert card["mode"] == "permute"
    assert card["version"] >= 1
    keys = {(each["attack"], each["layer"]) for each in card["recoveries"]}
    assert {layer for _, layer in keys} == {0, 3}
    assert len(keys) == len(card["recoveries"])
    for each in card["recoveries"]:
        assert 0 <= each["token_recovery"] <= 1
    assert {"max_logit_difference", "kl"} <= card["utility"].keys()
    assert {"tokens_per_second", "bytes_per_token", "round_trips_per_token"} <= card["cost"].keys()
    assert {"lying_server", "found_by"} == card["integrity"].keys()


def test_people_are_shown_rates_costs_and_what_is_promised(leakage):
    code, out, err = leakage("--mode", "client", "--model-dir", "MODEL", *SMALL)
    assert (code, err) == (0, "")
    for words in (
        "nearest-vocabulary", "100.0%", "Δlogit", "KL", "same greedy token", "tokens/s", "bytes",
        "1 round trip a token", "A lying server answers", "Found by: ",
    ):  # fmt: skip
        assert words in out
    assert out.splitlines()[-1].startswith("client: Stages are never sent a token")


def test_the_packages_cards_are_a_table(leakage):
    code, out, _ = leakage("--table")
    assert code == 0
    assert out.startswith("| mode | ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "missing --mode, --model-dir"),
        (("--mode", "plain"), "missing --model-dir"),
        (("--model-dir", "MODEL"), "missing --mode"),
        (("--mode", "cloak", "--model-dir", "MODEL"), "no mode is called 'cloak'; use plain, "),
        (("--mode", "plain", "--model-dir", "/nowhere"), "no config.json in /nowhere"),
        (("--mode", "plain", "--model-dir", "MODEL", "--texts", "0"), "--texts"),
        (("--mode", "plain", "--model-dir", "MODEL", "--texts", "21"), "--texts 21: there are 20"),
        (("--mode", "plain", "--model-dir", "MODEL", "--tokens", "1"), "--tokens"),
        (("--mode", "plain", "--model-dir", "MODEL", "--layers", "0,4"), "layers 0 to 3"),
        (("--mode", "plain", "--model-dir", "MODEL", "--layers", "first"), "--layers 'first'"),
        (("--mode", "plain", "--model-dir", "MODEL", "--threads", "0"), "--threads"),
        (("--mode", "plain", "--model-dir", "MODEL", "--plot", "/no/x.png"), "/no/x.png"),
    ],
)
def test_what_cannot_be_meant_is_one_line(leakage, arguments, words):
    code, out, err = leakage(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_a_picture_needs_its_library_before_anything_is_measured(leakage, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "x.png"
    code, _, err = leakage("--mode", "plain", "--model-dir", "MODEL", "--plot", path, *SMALL)
    assert code == 2
    assert "--plot needs matplotlib" in err
    assert not path.exists()


def test_a_picture_is_a_png(leakage, tmp_path):
    pytest.importorskip("matplotlib", reason="the optional dependency of pictures")
    path = tmp_path / "x.png"
    code, _, _ = leakage("--mode", "plain", "--model-dir", "MODEL", "--plot", path, *SMALL)
    assert code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["rotate", "dp"])
def test_a_bar_for_each_attack_stands_at_its_layer(monkeypatch, tmp_path, mode):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="an optional dependency")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    card = load_card(mode, MODES[mode].version)
    _draw(card, tmp_path / "x.png")
    (figure,) = drawn
    (axes,) = figure.axes
    layers = sorted({each.layer for each in card.recoveries})
    bars = {
        (bars.get_label(), layers[round(bar.get_x() + bar.get_width() / 2)]): bar.get_height()
        for bars in axes.containers
        for bar in bars
    }
    assert bars == {(each.attack, each.layer): each.token_recovery for each in card.recoveries}
    # even an attack that found nothing is seen, by its number
    assert [text.get_text() for text in axes.texts].count("0") == sum(
        each.token_recovery == 0 for each in card.recoveries
    )
    assert figure.legends
    assert mode in axes.get_title()
