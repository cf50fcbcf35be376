"""The ends of a model: which of them a shard holds, and where checkpoints keep them."""

from typing import NamedTuple

from transport.frozen import frozen


@frozen
class Names:
    """Where a family's checkpoints keep what every decoder has; layers are `prefix.index`."""

    embedding: str
    layers: str
    norm: str
    head: str


class Ends(NamedTuple):
    """Which ends of a model a shard holds beside its layers; the head comes with the final norm."""

    embedding: bool
    head: bool


# Of stages whose orchestrator holds both, and of the orchestrator's own part.
NO_ENDS, BOTH_ENDS = Ends(embedding=False, head=False), Ends(embedding=True, head=True)
