"""Which layers go to which machine, by what was measured: speed, memory, the way between."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, permutations
from pathlib import Path
from typing import NamedTuple

from pipeline.dtypes import WEIGHT_BYTES, Precision
from pipeline.errors import InputError
from pipeline.models.config import load_config
from pipeline.models.registry import layer_bytes
from pipeline.units import GIB
from pipeline.weights.checkpoint import stored_tensors
from pipeline.weights.quantization import ends_precision

# All orders of so many machines are tried; of more, those that go on to the nearest.
MAX_ORDERED = 6
# Of a machine's memory for weights; the rest is for keys, values and steps.
WEIGHT_SHARE = 0.8
# A weight takes a multiplication and an addition for each row.
_OPERATIONS_PER_WEIGHT = 2


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What a machine was measured to do."""

    name: str
    memory_bytes: int
    disk_bytes: int  # for its part's file
    bytes_per_second: float
    flops: float


class Way(NamedTuple):
    """How far it is from one machine to another."""

    round_trip_seconds: float
    bytes_per_second: float

    def seconds(self, num_bytes: int) -> float:
        """Until so many bytes are there."""
        return self.round_trip_seconds / 2 + num_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """What there is to split: bytes in the plan's precision, and those of a row between stages."""

    first_bytes: int  # the embedding, with the first stage
    layer_bytes: tuple[int, ...]
    last_bytes: int  # final norm and head, with the last
    whole_bytes: int  # of all in one stage, where a tied head is the embedding
    bytes_per_weight: float
    disk_share: float  # of its bytes in memory, what a part takes in its file
    row_bytes: int

    def part_bytes(self, start: int, end: int) -> int:
        """What a stage of these layers holds."""
        is_first, is_last = start == 0, end == len(self.layer_bytes)
        if is_first and is_last:
            return self.whole_bytes
        ends = self.first_bytes * is_first + self.last_bytes * is_last
        return sum(self.layer_bytes[start:end]) + ends

    def file_bytes(self, start: int, end: int) -> int:
        """What its part takes on a disk."""
        return int(self.part_bytes(start, end) * self.disk_share)


@dataclass(frozen=True, slots=True)
class MeasuredSplit:
    """The machines in the order of their stages, and each one's end layer."""

    order: tuple[int, ...]
    ends: tuple[int, ...]
    # Of one token, on each machine; what it takes between them.
    stage_seconds: tuple[float, ...]
    way_seconds: float


# From machine (by index; -1 is home) to machine; what is not there cannot be reached.
Ways = Mapping[tuple[int, int], Way]
HOME = -1


def load_of(model_dir: Path, precision: Precision) -> ModelLoad:
    """What a model's stages hold in that precision, by its files' headers. Raises ModelError."""
    config = load_config(model_dir)
    first, layers, last = layer_bytes(model_dir, config)
    stored = stored_tensors(model_dir, config.packing).values()
    num_weights = sum(math.prod(each.shape) for each in stored)
    num_bytes = sum(each.end - each.start for each in stored)
    each_bytes, end_bytes = WEIGHT_BYTES[precision], WEIGHT_BYTES[ends_precision(precision)]
    scale = each_bytes * num_weights / max(num_bytes, 1)
    end_scale = end_bytes * num_weights / max(num_bytes, 1)
    all_layers = sum(layers)
    return ModelLoad(
        first_bytes=int(first * end_scale),
        layer_bytes=tuple(int(size * scale) for size in layers),
        last_bytes=int(last * end_scale),
        whole_bytes=int(all_layers * scale + min(first + last, num_bytes - all_layers) * end_scale),
        bytes_per_weight=each_bytes,
        # What is to be computed in float32 is kept as it is stored.
        disk_share=num_bytes / (4 * max(num_weights, 1)) if precision == "float32" else 1.0,
        row_bytes=4 * config.hidden_dim,
    )


def split_by_speed(load: ModelLoad, machines: Sequence[MachineSpeed], ways: Ways) -> MeasuredSplit:
    """Every machine gets layers, the slowest stage as few as it can be; then the shortest way.

    A stage's time is that of a generated token and of one of its prompt: its weights are read once,
    and multiplied once more. Raises InputError where the model fits no memory or disk, or where no
    way leads through all machines and home.
    """
    num_layers = len(load.layer_bytes)
    if len(machines) > num_layers:
        raise InputError(
            f"{len(machines)} machines are more than the model's {num_layers} layers; join fewer"
        )
    # A machine that is alone holds all in one stage.
    apart = load.first_bytes + sum(load.layer_bytes) + load.last_bytes
    total = apart if len(machines) > 1 else load.whole_bytes
    room = sum(int(each.memory_bytes * WEIGHT_SHARE) for each in machines)
    if total > room:
        raise InputError(
            f"the model takes {_gib(total)} in this precision, the machines have {_gib(room)} for "
            "weights; choose a smaller --dtype, or join another machine"
        )
    best = _best(load, machines, ways)
    if best is None:
        raise InputError(_why_not(load, machines, ways, total))
    return best


def _best(load: ModelLoad, machines: Sequence[MachineSpeed], ways: Ways) -> MeasuredSplit | None:
    best: MeasuredSplit | None = None
    for order in _orders(len(machines), ways):
        found = _split(load, [machines[index] for index in order], order, ways)
        if found is not None and (best is None or _cost(found) < _cost(best)):
            best = found
    return best


def _cost(split: MeasuredSplit) -> float:
    return max(split.stage_seconds) + split.way_seconds


def _orders(count: int, ways: Ways) -> list[tuple[int, ...]]:
    """Orders in which home reaches the first machine, each the next, and the last one home."""
    if count <= MAX_ORDERED:
        candidates = list(permutations(range(count)))
    else:
        candidates = [_nearest_first(first, count, ways) for first in range(count)]
    return [order for order in candidates if all(hop in ways for hop in _hops(order))]


def _hops(order: Sequence[int]) -> list[tuple[int, int]]:
    stops = (HOME, *order, HOME)
    return list(pairwise(stops))


def _nearest_first(first: int, count: int, ways: Ways) -> tuple[int, ...]:
    order, left = [first], set(range(count)) - {first}
    while left:
        here = order[-1]
        away = {
            each: ways[here, each].round_trip_seconds if (here, each) in ways else math.inf
            for each in left
        }
        order.append(min(left, key=lambda each: (away[each], each)))
        left.discard(order[-1])
    return tuple(order)


def _split(
    load: ModelLoad, machines: Sequence[MachineSpeed], order: tuple[int, ...], ways: Ways
) -> MeasuredSplit | None:
    """Exact, by dynamic programming over (machine, layer); None where it does not fit so."""
    num_layers, count = len(load.layer_bytes), len(machines)
    prefix = [0]
    for size in load.layer_bytes:
        prefix.append(prefix[-1] + size)

    def seconds(position: int, start: int, end: int) -> float:
        machine = machines[position]
        # Of the embedding, a row is read.
        held = prefix[end] - prefix[start]
        held += load.last_bytes if end == num_layers else 0
        if load.part_bytes(start, end) > machine.memory_bytes * WEIGHT_SHARE:
            return math.inf
        if load.file_bytes(start, end) > machine.disk_bytes:
            return math.inf
        operations = held / load.bytes_per_weight * _OPERATIONS_PER_WEIGHT
        return held / machine.bytes_per_second + operations / machine.flops

    @cache
    def best(position: int, start: int) -> tuple[float, tuple[int, ...]]:
        if position == count - 1:
            return seconds(position, start, num_layers), (num_layers,)
        candidates = []
        for end in range(start + 1, num_layers - (count - position) + 2):
            rest, ends = best(position + 1, end)
            candidates.append((max(seconds(position, start, end), rest), (end, *ends)))
        return min(candidates)

    worst, ends = best(0, 0)
    if math.isinf(worst):
        return None
    starts = (0, *ends[:-1])
    times = [seconds(i, *each) for i, each in enumerate(zip(starts, ends, strict=True))]
    way = sum(ways[hop].seconds(load.row_bytes) for hop in _hops(order))
    return MeasuredSplit(order, ends, tuple(times), way)


def _why_not(load: ModelLoad, machines: Sequence[MachineSpeed], ways: Ways, total: int) -> str:
    count = len(machines)
    if not any((index, HOME) in ways for index in range(count)):
        return (
            "between no machine and home is a way for results: let both ports of the machines "
            "through, or with --home that port at home"
        )
    for index, machine in enumerate(machines):
        others = {(index, other) for other in range(HOME, count)}
        if not others & ways.keys():
            return f"{machine.name} reaches none of the others; let their ports through"
    if not _orders(count, ways):
        return "no way leads through all the machines and home; let their ports through"
    wanted = _best(load, [replace(each, disk_bytes=total) for each in machines], ways)
    if wanted is not None:
        return _disks_too_small(load, machines, wanted)
    return f"{_gib(total)} fit no split over these machines, each with a layer at least"


def _disks_too_small(
    load: ModelLoad, machines: Sequence[MachineSpeed], wanted: MeasuredSplit
) -> str:
    """Where the parts of a split that nothing else is in the way of do not fit."""
    short = []
    for index, start, end in zip(wanted.order, (0, *wanted.ends[:-1]), wanted.ends, strict=True):
        need, machine = load.file_bytes(start, end), machines[index]
        if need > machine.disk_bytes:
            has = _megabytes(machine.disk_bytes)
            short.append(f"{machine.name} needs {_megabytes(need)} and has {has}")
    return (
        f"the parts do not fit the machines' disks ({'; '.join(short)} free for parts): have old "
        "ones removed by `pipeline-orch parts --remove-unused`, raise --disk there, choose a "
        "smaller --dtype, or join another machine"
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
