import pytest

from pipeline.gateway.errors import ApiError, Kind
from pipeline.gateway.rate_limits import RateLimiter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_minutes_worth_at_once_then_evenly():
    clock = Clock()
    limiter = RateLimiter(6, clock)
    for _ in range(6):
        limiter.admit()
    with pytest.raises(ApiError) as caught:
        limiter.admit()
    assert (caught.value.kind, caught.value.retry_seconds) == (Kind.TOO_MANY, 10)
    clock.now += 10
    limiter.admit()
    with pytest.raises(ApiError):
        limiter.admit()
    clock.now += 1e6
    for _ in range(6):
        limiter.admit()
    with pytest.raises(ApiError):
        limiter.admit()


def test_without_a_limit_all_are_admitted():
    limiter = RateLimiter(None, Clock())
    for _ in range(1000):
        limiter.admit()
