"""What Gaussian noise on rows adds up to over a session, and how much of it may be spent.

The analytic Gaussian mechanism (Balle & Wang 2018, Theorem 8): with noise of standard deviation
sigma on something that changes by at most Delta, mu = Delta / sigma says all. Many of them compose
exactly, mu^2 being the sum of theirs (Dong, Roth & Su 2022), so every row costs the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import BudgetSpent, InputError, PromptError

# Any row may become any other: both lie in a ball of radius `clip`.
SENSITIVITY_PER_CLIP = 2.0
# More bounds nothing: e to this is how much likelier one text may be found than another.
MAX_EPSILON = 1e30


def delta_of(mu: float, epsilon: float) -> float:
    """The least delta for an epsilon from 0, exactly."""
    low = (epsilon / mu - mu / 2) / math.sqrt(2)
    high = (epsilon / mu + mu / 2) / math.sqrt(2)
    # Phi(-low) - e^epsilon Phi(-high); e^epsilon overflows, and cancels against the tail's.
    if low < 0:
        return 0.5 * (math.erfc(low) - math.exp(-low * low) * _erfcx(high))
    return 0.5 * math.exp(-low * low) * (_erfcx(low) - _erfcx(high))


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon for a delta in (0, 1)."""
    enough = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    return _boundary(lambda epsilon: delta_of(mu, epsilon) > delta, enough)[1]


def mu_of(epsilon: float, delta: float) -> float:
    """The most mu that an epsilon and a delta allow."""
    too_much = 1.0
    while delta_of(too_much, epsilon) <= delta:
        too_much *= 2
    return _boundary(lambda mu: mu == 0 or delta_of(mu, epsilon) <= delta, too_much)[0]


class PrivacyBudget:
    """Counts the rows of a session against the bound that its user has set.

    What is protected is the text of a session's prompts as a whole, of known lengths: every row of
    it may be another. The bound is on all rows that whoever serves the stages is ever sent. A
    request pays for its rows before they are, and gets back what it has not sent when it ends.
    """

    def __init__(self, sigma: float, clip: float, epsilon: float, delta: float) -> None:
        """Raises InputError for an epsilon and a delta that bound nothing."""
        if not 0 < epsilon <= MAX_EPSILON:
            raise InputError(
                f"--dp-epsilon {epsilon:g}: give a number above 0, at most {MAX_EPSILON:g}"
            )
        if not 0 < delta < 1:
            raise InputError(f"--dp-delta {delta:g}: give a number between 0 and 1")
        self.sigma = sigma
        self.sensitivity = SENSITIVITY_PER_CLIP * clip
        self.epsilon = epsilon
        self.delta = delta
        self.num_spent = 0
        self._open: dict[int, _Account] = {}
        self._max_mu = mu_of(epsilon, delta)
        self.max_rows = math.floor((self._max_mu * sigma / self.sensitivity) ** 2)

    def composed_epsilon(self, num_rows: int) -> float:
        """What so many rows add up to, at this delta."""
        mu = self.sensitivity / self.sigma * math.sqrt(num_rows)
        return epsilon_of(mu, self.delta) if mu else 0.0

    def describe(self, num_rows: int) -> str:
        """That in words, with what it rests on."""
        return (
            f"{num_rows} rows compose to epsilon {self.composed_epsilon(num_rows):.4g} at delta "
            f"{self.delta:g} (sigma {self.sigma:g}, sensitivity {self.sensitivity:g})"
        )

    def spend_prompt(self, request_id: int, num_rows: int) -> None:
        """Open a request: pay for its prompt's rows. Raises PromptError if that is too much."""
        wanted = self.num_spent + num_rows
        if wanted > self.max_rows:
            whose = "the prompt's"
            if self.num_spent:
                whose = f"the prompt has {num_rows} rows, and with those before it"
            sigma = self.sensitivity * math.sqrt(wanted) / self._max_mu
            raise PromptError(
                f"{whose} {self.describe(wanted)}, above the bound of {self.epsilon:g}; it would "
                f"take --dp-epsilon {_above(wanted, self):.4g}, or a manifest whose sigma is "
                f"{sigma:.4g}"
            )
        self.num_spent = wanted
        self._open[request_id] = _Account(num_paid=num_rows)

    def spend_token(self, request_id: int) -> None:
        """Pay for the row of a token that goes back to the stages. Raises BudgetSpent."""
        if self.num_spent >= self.max_rows:
            raise BudgetSpent(
                f"the session's privacy budget is spent: {self.describe(self.num_spent)}, and one "
                f"more is above the bound of {self.epsilon:g}; the text so far is whole, and a "
                "session with a budget of its own can go on from it"
            )
        self.num_spent += 1
        self._open[request_id].num_paid += 1

    def will_send(self, request_id: int, num_rows: int) -> None:
        """Of an open request's rows so many are on their way, from the first on; nothing else is.

        What is sent again after a loss is the same bytes, so that it costs nothing.
        """
        account = self._open[request_id]
        account.num_sent = max(account.num_sent, num_rows)
        assert account.num_sent <= account.num_paid, "rows are paid for before they are sent"

    def close(self, request_id: int) -> int:
        """End a request, if it is open: how many rows it gets back that it has not sent."""
        account = self._open.pop(request_id, _Account(0))
        refund = account.num_paid - account.num_sent
        self.num_spent -= refund
        return refund


@dataclass(slots=True)
class _Account:
    """The rows of a request that is open."""

    num_paid: int
    num_sent: int = 0


def _above(num_rows: int, budget: PrivacyBudget) -> float:
    """Enough when rounded to the four digits that are shown."""
    return budget.composed_epsilon(num_rows) * 1.001


def _boundary(is_below: Callable[[float], bool], above: float) -> tuple[float, float]:
    """Numbers from 0 to `above` next to where `is_below` ends to hold: before it and behind it."""
    below = 0.0
    while below < (middle := (below + above) / 2) < above:
        below, above = (middle, above) if is_below(middle) else (below, middle)
    return below, above


def _erfcx(x: float) -> float:
    """e^(x^2) erfc(x) for x from 0."""
    if x < 25:
        return math.exp(x * x) * math.erfc(x)
    inverse = 1 / (2 * x * x)
    return (1 - inverse + 3 * inverse**2 - 15 * inverse**3) / (x * math.sqrt(math.pi))
