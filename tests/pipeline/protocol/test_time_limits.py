"""Time limits are one value, and what is no time is refused by its name."""

import math

import pytest

from pipeline.errors import InputError
from pipeline.protocol.time_limits import TimeLimits


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["connect", "handshake", "init", "idle", "request"])
def test_what_is_no_time_is_named(name, seconds):
    with pytest.raises(InputError, match=f"{name}_seconds"):
        TimeLimits(**{f"{name}_seconds": seconds})
