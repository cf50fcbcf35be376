"""Which weights of a model are packed, and how, by its tensors' names and its config.json."""

from collections.abc import Collection, Mapping

from pipeline.weights.packings.base import PackedWeight
from pipeline.weights.packings.blocks import find_blocks


def find_packed(names: Collection[str]) -> Mapping[str, PackedWeight]:
    """The packed weights among these tensors, by the names of the weights."""
    return {each.name: each for each in find_blocks(names)}
