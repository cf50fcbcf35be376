"""`pipeline-orch join`: from lines, and what was joined before, to a manifest over machines."""

import os
from collections.abc import Sequence
from functools import partial

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import (
    ORCHESTRATOR_KEY,
    fingerprint,
    own_identity,
    state_directory,
)
from pipeline.agreement.manifest import Manifest, check_precision, load_manifest
from pipeline.cli.cluster_flags import JoinFlags, results_endpoint
from pipeline.cli.cluster_plan import ClusterPlan
from pipeline.cli.logs import tell as tell_as
from pipeline.cli.push import push_parts
from pipeline.cli.software import software_version
from pipeline.dtypes import Precision
from pipeline.errors import InputError, SessionError
from pipeline.files import check_writable, is_file
from pipeline.machines.delivery import machines_of
from pipeline.machines.newcomers import Newcomers
from pipeline.machines.offer_line import OfferLine, parse_offer_line
from pipeline.machines.survey import Survey
from pipeline.machines.visitor import Address, MachineRefuses, address_of, pairing, visiting
from pipeline.models.config import load_config
from pipeline.planning.measured_split import MeasuredSplit
from pipeline.units import GIB

tell = partial(tell_as, "pipeline-orch")


def join(lines: Sequence[str], flags: JoinFlags) -> None:
    """Pair, measure, plan, cut, and write the manifest. Raises PipelineError."""
    offered = _parse_all(lines)
    before = load_manifest(flags.output) if is_file(flags.output) else None
    newcomers = Newcomers(flags.output)
    known = [*([] if before is None else machines_of(before)), *newcomers.read()]
    left_out = [_find(each, known) for each in flags.remove]
    if not lines and not known:
        raise InputError("give a line of `stage-worker offer` for each machine")
    load_config(flags.model_dir)
    check_writable(flags.output)
    own = own_identity(state_directory(os.environ), ORCHESTRATOR_KEY)
    plan = ClusterPlan(
        flags.model_dir,
        flags.output,
        _precision(flags, before),
        own,
        results_endpoint(flags.home),
        flags.mix_kernels,
    )
    kept = [each for each in known if each not in left_out]

    async def ask() -> Survey:
        joined = [await _pair(line, own, newcomers) for line in offered]
        # One that was set up anew is at its old place with another key, or elsewhere with its own.
        new = {each.key for each in joined} | {each.endpoint for each in joined}
        old = [each for each in kept if not {each.key, each.endpoint} & new]
        addresses = [*old, *joined]
        if not addresses:
            raise InputError("no machine would be left; remove the manifest's file instead")
        return await plan.survey(addresses)

    found = trio.run(ask)
    split = plan.split(found)
    _show(found, split)
    plan.write(found, split)
    newcomers.clear()
    for address in left_out:
        trio.run(_retire, address, own)
    if flags.push:
        push_parts(flags.output, None)
    else:
        tell(f"next: pipeline-orch push --manifest {flags.output}")


def _parse_all(lines: Sequence[str]) -> list[OfferLine]:
    found = [parse_offer_line(line) for line in lines]
    for index, line in enumerate(found):
        if any(line.key == other.key for other in found[:index]):
            raise InputError(f"two lines are of {address_of(line)}; give one of them")
    return found


def _find(name: str, known: Sequence[Address]) -> Address:
    """Raises InputError for a machine that the manifest does not have."""
    found = [each for each in known if name in {each.host_port, fingerprint(each.key)}]
    if len(found) != 1:
        names = ", ".join(each.host_port for each in known) or "none"
        raise InputError(f"--remove {name}: the manifest has these machines: {names}")
    return found[0]


def _precision(flags: JoinFlags, before: Manifest | None) -> Precision:
    if flags.dtype is not None:
        return check_precision(flags.dtype)
    return (before and before.stages[0].precision) or "float32"


async def _pair(line: OfferLine, own: X25519PrivateKey, newcomers: Newcomers) -> Address:
    shown = fingerprint(own.public_key().public_bytes_raw())
    tell(f"joining {address_of(line)}; it may ask about this home: {shown}")
    try:
        async with pairing(line, own) as visit:
            await visit.join(software_version())
    except MachineRefuses as error:
        if shown in str(error):
            raise MachineRefuses(f"{error}; that is this home: leave the line out") from error
        raise
    newcomers.add(address_of(line))
    return address_of(line)


async def _retire(address: Address, own: X25519PrivateKey) -> None:
    try:
        async with visiting(address, own) as visit:
            await visit.retire()
    except SessionError as error:
        tell(f"left out, but not told: {error}")


def _show(found: Survey, split: MeasuredSplit) -> None:
    """The split as a table, the machines in the order of their stages."""
    heads = ("stage", "machine", "layers", "kernels", "cores", "memory", "disk")
    rows = [(*heads, "reads", "computes", "a token", "on to the next")]
    for stage, (index, end) in enumerate(zip(split.order, split.ends, strict=True)):
        machine = found.machines[index]
        start = split.ends[stage - 1] if stage else 0
        after = split.order[stage + 1] if stage + 1 < len(split.order) else -1
        way = found.ways[index, after]
        rows.append(
            (
                str(stage),
                machine.address.host_port,
                f"{start}-{end - 1}",
                machine.description.kernels,
                str(machine.description.cores),
                f"{machine.description.memory_bytes / GIB:.1f} GiB",
                f"{machine.description.disk_bytes / GIB:.1f} GiB",
                f"{machine.measured.bytes_per_second / 1e9:.1f} GB/s",
                f"{machine.measured.flops / 1e9:.0f} GFLOP/s",
                f"{split.stage_seconds[stage] * 1e3:.2f} ms",
                f"{way.round_trip_seconds * 1e3:.2f} ms, {way.bytes_per_second / 1e6:.0f} MB/s",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
