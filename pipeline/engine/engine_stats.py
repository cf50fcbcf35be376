"""What an engine says of itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field, fields

from transport.frozen import frozen


@frozen
class EngineStats:
    """What the engine is doing now, and has done; tokens are those its requests have heard of."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_tokens: int
    num_failovers: int
    last_batch: int
    # Handshakes with stages so far, and how long the last recovery took; 0 before the first.
    num_handshakes: int = 0
    recovery_seconds: float = 0.0
    # Where the ends of the model are held here, what steps have cost here, by part, nanoseconds.
    home_times: Mapping[str, int] = field(default_factory=dict)
    # Slots that hold what nobody owns, requests that went on from such or from another's slot, and
    # the tokens of theirs that were so not computed.
    num_idle_prefixes: int = 0
    num_prefix_hits: int = 0
    num_cached_tokens: int = 0
    # Tokens that all requests may hold together, 0 if nothing bounds them, and hold now; how often
    # one has given way to those before it.
    pool_tokens: int = 0
    held_tokens: int = 0
    num_given_way: int = 0


def together(stats: Sequence[EngineStats]) -> EngineStats:
    """What several engines do as one: sums, and the latest recovery that took longest."""
    home_times: Counter[str] = Counter()
    for each in stats:
        home_times.update(each.home_times)
    named = {field.name for field in fields(EngineStats)} - {"home_times", "recovery_seconds"}
    return EngineStats(
        **{name: sum(getattr(each, name) for each in stats) for name in named},
        home_times=dict(home_times),
        recovery_seconds=max(each.recovery_seconds for each in stats),
    )
