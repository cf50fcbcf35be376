"""Hidden messages are not told from sampling by a test that tells a sampler off by one per cent."""

from pathlib import Path
from random import Random

import numpy as np
import pytest

from pipeline.sampling.params import SamplingParams
from pipeline.stego.codecs import parse_codec

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def statistics():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import stego_statistics

        yield stego_statistics


@pytest.fixture(scope="module")
def contexts(statistics):
    params = SamplingParams(temperature=1.0, top_k=50)
    return statistics.contexts_of(statistics.synthetic_logits(300, 400, seed=1), params)


@pytest.mark.parametrize(
    ("name", "steps"), [("range", 40_000), pytest.param("fimec", 8000, marks=pytest.mark.slow)]
)
def test_a_codecs_tokens_are_distributed_as_sampled_ones(
    statistics, contexts, monkeypatch, name, steps
):
    monkeypatch.setattr(statistics, "NUM_READ", 2)
    codec = parse_codec(name)
    record = statistics.write_messages(codec, contexts, steps, Random(7))
    points = statistics.points_of(record, contexts, np.random.default_rng(7))
    assert points.size >= steps
    assert statistics.p_value(points) > statistics.REJECTED


def test_a_codec_that_is_off_is_told(statistics, contexts, monkeypatch):
    class Off:
        """One token in 25 is the likeliest instead of the codec's."""

        def __init__(self, writer, random):
            self.writer, self.random = writer, random

        def __getattr__(self, name):
            return getattr(self.writer, name)

        def choose(self, weights):
            index = self.writer.choose(weights)
            return index if self.random.random() > 0.04 else int(weights.weights.argmax())

    class OffCodec:
        name = "off"

        def __init__(self, random):
            self.random, self.codec = random, parse_codec("range")

        def writer(self, payload, key):
            return Off(self.codec.writer(payload, key), self.random)

        def reader(self, num_bytes, key):
            return None

    monkeypatch.setattr(statistics, "NUM_READ", 0)
    record = statistics.write_messages(OffCodec(Random(3)), contexts, 40_000, Random(7))
    points = statistics.points_of(record, contexts, np.random.default_rng(7))
    assert statistics.p_value(points) < statistics.REJECTED


def test_a_sampler_is_told_from_one_that_is_off_by_one_per_cent(statistics, contexts):
    random = np.random.default_rng(9)
    assert statistics.p_value(statistics.sampled_points(contexts, 200_000, random, 0.0)) > 0.001
    assert statistics.p_value(statistics.sampled_points(contexts, 200_000, random, 0.01)) < 1e-6
    assert statistics.power(contexts, random) > 0.8


def test_the_sampler_is_off_by_one_per_cent_in_total_variation(statistics, contexts):
    context = next(each for each in contexts if 0.3 < each.ends[each.num_ahead - 1] < 0.5)
    uniforms = (np.arange(200_000) + 0.5) / 200_000
    counts = np.bincount(context.sampled(uniforms, 0.01), minlength=context.shares.size)
    distance = np.abs(counts / uniforms.size - context.shares).sum() / 2
    assert distance == pytest.approx(0.01, abs=0.0005)


# From the asymptotic distribution's table: K = 1.358 at 5 %, 1.628 at 1 %, 0.828 at 50 %.
@pytest.mark.parametrize(("scaled", "expected"), [(0.828, 0.5), (1.358, 0.05), (1.628, 0.01)])
def test_p_values_are_those_of_the_table(statistics, scaled, expected):
    count = 1_000_000
    points = (np.arange(count) + 0.5) / count * (1 - scaled / np.sqrt(count))
    assert statistics.p_value(points) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "10"], "--steps: 10: give a whole number from 1000"),
        (["fimec:block_bits=99"], "give 1 to 12"),
        (["rot13"], "there is no codec 'rot13'"),
        (["--logits", "/nowhere"], "/nowhere: No such file"),
        (["--logits", __file__], "not a file of --record"),
    ],
)
def test_wrong_arguments_are_one_line(statistics, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("sys.argv", ["stego_statistics.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        statistics.run_main("stego_statistics", statistics.main)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_the_table_tells_codecs_rates_and_costs(statistics, monkeypatch, capsys):
    arguments = ["--steps", "60000", "--contexts", "200", "range"]
    monkeypatch.setattr("sys.argv", ["stego_statistics.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        statistics.run_main("stego_statistics", statistics.main)
    out = capsys.readouterr().out
    assert caught.value.code == 0, out
    rows = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if "|" in line}
    assert float(rows["range"][4].strip(" %")) > 96
    assert float(rows["sampling, 1 % off"][3]) < 0.001
