"""What noise adds up to: held against published values, a reference of many digits, and abuse."""

import math

import mpmath
import pytest

from pipeline.codecs.privacy_budget import PrivacyBudget, delta_of, epsilon_of, mu_of
from pipeline.errors import BudgetSpent, InputError, PromptError


# Of Google's dp_accounting (Apache-2.0), its tests of the Gaussian mechanism.
@pytest.mark.parametrize(
    ("sigma", "sensitivity", "epsilon", "delta"),
    [(1, 1, 1, 0.12693674), (2, 2, 1, 0.12693674), (1, 3, 1, 0.78760074), (1, 1, 2, 0.02092364)],
)
def test_delta_is_what_is_published(sigma, sensitivity, epsilon, delta):
    assert delta_of(sensitivity / sigma, epsilon) == pytest.approx(delta, abs=1e-8)


def test_the_analytic_sigma_is_what_is_published():
    # Of Balle and Wang's code for epsilon 1, delta 1e-5; the classical sigma would be 4.84.
    assert 1 / mu_of(1.0, 1e-5) == pytest.approx(3.730632, abs=1e-6)


def test_a_noise_of_epsilon_2_for_each_vector_is_far_from_that_for_a_text():
    sigma = math.sqrt(2 * math.log(1.25 / 1e-5)) / 2  # the classical calibration to epsilon 2
    assert epsilon_of(1 / sigma, 1e-5) < 2
    assert epsilon_of(math.sqrt(204) / sigma, 1e-5) == pytest.approx(42, abs=0.5)


def reference(mu, epsilon):
    with mpmath.workdps(400):
        mu, epsilon = mpmath.mpf(mu), mpmath.mpf(epsilon)
        tail = mpmath.exp(epsilon) * mpmath.ncdf(-epsilon / mu - mu / 2)
        return mpmath.ncdf(-epsilon / mu + mu / 2) - tail


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1, 7, 33.3, 1e3])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
def test_epsilon_and_mu_are_exact_where_exponentials_overflow(mu, delta):
    epsilon = epsilon_of(mu, delta)
    if epsilon > 1e-9:
        assert float(reference(mu, epsilon)) == pytest.approx(delta, rel=1e-6)
        assert mu_of(epsilon, delta) == pytest.approx(mu, rel=1e-6)
    else:
        assert reference(mu, 0) <= delta * (1 + 1e-9)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_epsilon_that_bounds_nothing_is_refused(value):
    with pytest.raises(InputError, match="--dp-epsilon"):
        PrivacyBudget(1.0, 1.0, value, 1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, 1.0, 3.0])
def test_a_delta_that_bounds_nothing_is_refused(value):
    with pytest.raises(InputError, match="--dp-delta"):
        PrivacyBudget(1.0, 1.0, 2.0, value)


@pytest.mark.parametrize("epsilon", [1e-300, 1e-3, 2.0, 1e9, 1e30])
def test_rows_are_as_many_as_stay_within_the_bound(epsilon):
    budget = PrivacyBudget(0.5, 1.0, epsilon, 1e-5)
    assert budget.composed_epsilon(budget.max_rows) <= epsilon * (1 + 1e-9)
    assert budget.composed_epsilon(budget.max_rows + 1) >= epsilon * (1 - 1e-9)


def test_the_defaults_refuse_a_prompt_and_say_what_it_would_take():
    budget = PrivacyBudget(0.03, 7.5, 2.0, 1e-5)
    with pytest.raises(PromptError, match="the prompt's 12 rows") as caught:
        budget.spend_prompt(0, 12)
    assert budget.num_spent == 0
    words = str(caught.value).split()
    epsilon = float(words[words.index("--dp-epsilon") + 1].rstrip(","))
    PrivacyBudget(0.03, 7.5, epsilon, 1e-5).spend_prompt(0, 12)
    sigma = float(words[-1])
    PrivacyBudget(sigma * 1.001, 7.5, 2.0, 1e-5).spend_prompt(0, 12)


def test_a_session_spends_prompts_and_tokens_together():
    budget = PrivacyBudget(1.0, 0.5, 10.0, 1e-5)
    budget.spend_prompt(0, budget.max_rows - 2)
    with pytest.raises(PromptError, match="before it"):
        budget.spend_prompt(1, 3)
    assert budget.close(1) == 0
    budget.spend_token(0)
    budget.spend_token(0)
    with pytest.raises(BudgetSpent, match="is spent"):
        budget.spend_token(0)
    assert budget.num_spent == budget.max_rows


def test_a_request_gets_back_what_it_has_not_sent_and_nothing_else():
    budget = PrivacyBudget(1.0, 0.5, 100.0, 1e-5)
    budget.spend_prompt(0, 5)
    budget.spend_prompt(1, 4)
    budget.will_send(0, 3)
    budget.will_send(0, 2)  # once more, after a loss
    assert budget.close(0) == 2
    assert budget.close(0) == 0
    assert budget.num_spent == 7
    budget.will_send(1, 4)
    budget.spend_token(1)
    assert (budget.close(1), budget.num_spent) == (1, 7)
    budget.spend_prompt(2, 1)
    with pytest.raises(AssertionError, match="paid for before"):
        budget.will_send(2, 2)
