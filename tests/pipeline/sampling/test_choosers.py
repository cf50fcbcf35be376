"""What picks the token, after all filters: the registered ones, and anyone's own."""

import math

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.sampling import choosers
from pipeline.sampling.choosers import (
    CHOOSERS,
    Chooser,
    Distribution,
    Mirostat,
    chooser_of,
    new_chooser,
    parse_chooser,
)
from pipeline.sampling.draw import draw, token_at
from pipeline.sampling.params import ChooserSpec, SamplingParams
from pipeline.sampling.sampler import Sampler

UNFILTERED = SamplingParams(temperature=1.0)


def random_logits(seed, vocab=400):
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def chosen(params, num=40, **more):
    sampler = Sampler(params, (), **more)
    return [sampler.choose(random_logits(seed)).token_id for seed in range(num)]


def test_a_distribution_holds_what_is_left_and_its_probabilities():
    logits = np.array([0, -np.inf, math.log(3), -2000], np.float32)
    final = Distribution(logits, UNFILTERED)
    assert final.ids.tolist() == [0, 2]  # the last one's probability is 0 in any arithmetic
    assert final.probabilities.tolist() == pytest.approx([0.25, 0.75])


def test_drawing_by_name_is_what_is_done_without_a_name():
    seeded = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
    named = SamplingParams(**seeded, chooser=ChooserSpec("draw"))
    assert chosen(named) == chosen(SamplingParams(**seeded))


def test_the_greedy_one_takes_the_most_likely_at_any_temperature():
    named = SamplingParams(temperature=1.5, chooser=ChooserSpec("greedy"))
    assert chosen(named) == chosen(SamplingParams(logprobs=0))


def test_who_wants_the_most_likely_token_alone_pays_for_no_filter(monkeypatch):
    monkeypatch.setattr(choosers, "final", lambda *_: pytest.fail("was filtered"))
    chosen(SamplingParams(temperature=0.7, top_p=0.9, chooser=ChooserSpec("greedy")))


def test_one_that_draws_by_a_number_of_its_own_is_drawn_alike_by_the_last_stage():
    class Told(Chooser):
        def __init__(self):
            self.numbers = [0.9, 0.5, 0.1]

        def uniform(self, ahead=0):
            return self.numbers[-1 - ahead]

        def spend(self):
            self.numbers.pop()

        def choose(self, final):
            token_id = token_at(final.logits, self.uniform())
            self.spend()
            return token_id

    params = SamplingParams(temperature=0.8, top_k=50)
    here, there = (Sampler(params, (), chooser=Told()) for _ in range(2))
    for seed in range(3):
        token_id = draw(random_logits(seed), there.next_draw())
        assert here.choose(random_logits(seed)).token_id == token_id
        there.took(token_id)


class Recording:
    """Takes the last of what is left, and remembers what that was."""

    def __init__(self):
        self.seen = []

    def choose(self, final):
        self.seen.append((final.ids.tolist(), final.probabilities))
        return int(final.ids[-1])


def test_ones_own_chooser_sees_what_filters_leave():
    chooser = Recording()
    params = SamplingParams(temperature=0.5, top_k=3, logit_bias={7: -100.0})
    sampler = Sampler(params, (), chooser=chooser)
    logits = np.array([0, 1, 2, 3, 3.5, -1, -1, 9], np.float32)
    assert sampler.choose(logits).token_id == 4
    ((ids, probabilities),) = chooser.seen
    assert ids == [2, 3, 4]
    weights = np.exp(np.array([2, 3, 3.5]) / 0.5)
    np.testing.assert_allclose(probabilities, weights / weights.sum(), rtol=1e-5)


def test_at_temperature_zero_one_token_is_left():
    chooser = Recording()
    Sampler(SamplingParams(), (), chooser=chooser).choose(random_logits(3))
    ((ids, probabilities),) = chooser.seen
    assert ids == [int(random_logits(3).argmax())]
    assert probabilities.tolist() == [1.0]


@pytest.mark.parametrize("token_id", [0, -1, 400])
def test_a_chooser_cannot_take_what_is_not_left(token_id):
    class Stubborn:
        def choose(self, final):
            return token_id

    sampler = Sampler(SamplingParams(temperature=1.0, top_k=1), (), chooser=Stubborn())
    logits = random_logits(0)
    logits[0] = -5
    with pytest.raises(InputError, match="not left"):
        sampler.choose(logits)


@pytest.mark.parametrize("tau", [2.5, 3.0, 4.0])
def test_mirostat_keeps_the_surprise_near_its_target(tau):
    """Under flat and peaked distributions in turn."""
    mirostat = Mirostat(np.random.default_rng(1), tau, eta=0.1)
    rng = np.random.default_rng(2)
    surprises = []
    for step in range(2000):
        logits = rng.normal(0, 2 + step % 3, 1000).astype(np.float32)
        final = Distribution(logits, UNFILTERED)
        token_id = mirostat.choose(final)
        place = int(np.searchsorted(final.ids, token_id))
        surprises.append(-math.log2(final.probabilities[place]))
    assert np.mean(surprises[200:]) == pytest.approx(tau, abs=0.1)


def test_mirostat_leaves_out_what_surprises_more_than_its_bound():
    mirostat = Mirostat(np.random.default_rng(0), tau=1.0, eta=1e-9)
    final = Distribution(np.log(np.array([0.6, 0.25, 0.1, 0.05], np.float32)), UNFILTERED)
    found = {mirostat.choose(final) for _ in range(300)}
    assert found == {0, 1}  # two bits at most
    mirostat.bound = -3.0  # nothing is as likely as that: one token stays
    assert {mirostat.choose(final) for _ in range(50)} == {0}


def test_requests_have_state_of_their_own():
    params = SamplingParams(
        temperature=1.0, seed=4, chooser=ChooserSpec("mirostat", {"tau": 2.0, "eta": "0.5"})
    )
    alone = chosen(params)
    first, second = Sampler(params, ()), Sampler(params, ())
    interleaved = []
    for seed in range(40):
        interleaved.append(first.choose(random_logits(seed)).token_id)
        second.choose(random_logits(seed + 1000))
    assert interleaved == alone
    other = {"temperature": 1.0, "seed": 4}
    assert alone != chosen(SamplingParams(**other))
    assert alone != chosen(SamplingParams(**other, chooser=ChooserSpec("mirostat", {"tau": 8.0})))


def test_names_and_options_are_read_from_the_command_line():
    assert parse_chooser("greedy") == ChooserSpec("greedy", {})
    spec = parse_chooser("mirostat:tau=3,eta=0.2")
    assert dict(spec.options) == {"tau": "3", "eta": "0.2"}
    mirostat = new_chooser(SamplingParams(temperature=1.0, chooser=spec))
    assert mirostat.bound == 6.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mirostart", "draw, greedy, mirostat"),
        ("", "draw, greedy, mirostat"),
        ("draw:tau=1", "no option 'tau'; it has none"),
        ("mirostat:tau", "key=value"),
        ("mirostat:tau=1,tau=2", "tau=2"),
        ("mirostat:tau=1,,", "key=value"),
        ("mirostat:tua=1", "it has tau, eta"),
        ("mirostat:tau=0", "above 0"),
        ("mirostat:tau=nan", "above 0"),
        ("mirostat:tau=inf", "at most 20"),
        ("mirostat:eta=x", "eta is 'x'"),
    ],
)
def test_what_is_wrong_with_a_chooser_is_said_by_name(text, words):
    with pytest.raises(InputError) as caught:
        parse_chooser(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, "", "1e400", -1, None, [1], {}])
def test_an_option_of_any_json_type_is_checked(value):
    with pytest.raises(InputError, match="eta"):
        chooser_of({"name": "mirostat", "eta": value})


@pytest.mark.parametrize("name", CHOOSERS)
def test_every_registered_chooser_takes_what_is_left_and_repeats_itself(name):
    params = SamplingParams(temperature=0.7, top_k=5, seed=9, chooser=ChooserSpec(name))
    tokens = chosen(params)
    assert tokens == chosen(params)
    for seed, token_id in enumerate(tokens):
        assert token_id in np.argsort(-random_logits(seed))[:5]
