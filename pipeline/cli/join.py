"""`pipeline-orch join`: from lines, and what was joined before, to a manifest over machines."""

import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import (
    ORCHESTRATOR_KEY,
    fingerprint,
    own_identity,
    public_hex,
    state_directory,
)
from pipeline.agreement.manifest import (
    Manifest,
    build_manifest,
    check_precision,
    dump_manifest,
    load_manifest,
)
from pipeline.cli.cluster_flags import JoinFlags, results_endpoint
from pipeline.cli.logs import tell as tell_as
from pipeline.cli.progress import progress_bar
from pipeline.cli.push import push_parts
from pipeline.cli.shard_directories import parts_dir
from pipeline.cli.software import software_version
from pipeline.dtypes import Precision
from pipeline.errors import InputError, SessionError
from pipeline.files import check_writable, is_file, write_atomically
from pipeline.machines.delivery import machines_of
from pipeline.machines.offer_line import OfferLine, parse_offer_line
from pipeline.machines.survey import Survey, Surveyed, survey
from pipeline.machines.visitor import Address, address_of, pairing, visiting
from pipeline.models.config import load_config
from pipeline.planning.measured_split import (
    MachineSpeed,
    MeasuredSplit,
    Way,
    load_of,
    split_by_speed,
)
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from transport.dial_and_listen import TcpEndpoint

tell = partial(tell_as, "pipeline-orch")


def join(lines: Sequence[str], flags: JoinFlags) -> None:
    """Pair, measure, plan, cut, and write the manifest. Raises PipelineError."""
    offered = _parse_all(lines)
    before = load_manifest(flags.output) if is_file(flags.output) else None
    known = [] if before is None else machines_of(before)
    left_out = [_find(each, known) for each in flags.remove]
    if not lines and not left_out and before is None:
        raise InputError("give a line of `stage-worker offer` for each machine")
    config = load_config(flags.model_dir)
    check_writable(flags.output)
    precision = _precision(flags, before)
    home = results_endpoint(flags.home)
    own = own_identity(state_directory(os.environ), ORCHESTRATOR_KEY)
    kept = [each for each in known if each not in left_out]

    async def ask() -> Survey:
        joined = [await _pair(line, own) for line in offered]
        # One that was set up anew is at its old place with another key, or elsewhere with its own.
        new = {each.key for each in joined} | {each.endpoint for each in joined}
        old = [each for each in kept if not {each.key, each.endpoint} & new]
        addresses = [*old, *joined]
        if not addresses:
            raise InputError("no machine would be left; remove the manifest's file instead")
        return await survey(addresses, own, config.head_dim, software_version(), home, tell)

    found = trio.run(ask)
    _check_kernels(found, flags)
    split = _split(found, flags.model_dir, precision)
    _show(found, split)
    manifest = _plan(found, split, flags.model_dir, precision, own)
    _write(manifest, flags, precision)
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


async def _pair(line: OfferLine, own: X25519PrivateKey) -> Address:
    shown = fingerprint(own.public_key().public_bytes_raw())
    tell(f"joining {address_of(line)}; it may ask about this home: {shown}")
    async with pairing(line, own) as visit:
        await visit.join(software_version())
        return visit.address


async def _retire(address: Address, own: X25519PrivateKey) -> None:
    try:
        async with visiting(address, own) as visit:
            await visit.retire()
    except SessionError as error:
        tell(f"left out, but not told: {error}")


def _check_kernels(found: Survey, flags: JoinFlags) -> None:
    by_kernels: dict[str, list[str]] = {}
    for each in found.machines:
        by_kernels.setdefault(each.description.kernels, []).append(each.address.host_port)
    if len(by_kernels) > 1 and not flags.mix_kernels:
        shown = "; ".join(f"{name}: {', '.join(where)}" for name, where in by_kernels.items())
        raise InputError(
            f"these machines compute with kernels that round differently ({shown}); texts would "
            "depend on which machine has which layers: start some with --kernels torch, or give "
            "--mix-kernels"
        )


def _split(found: Survey, model_dir: Path, precision: Precision) -> MeasuredSplit:
    speeds = [
        MachineSpeed(
            each.address.host_port,
            each.description.memory_bytes,
            each.measured.bytes_per_second,
            each.measured.flops,
        )
        for each in found.machines
    ]
    ways = {
        hop: Way(each.round_trip_seconds, each.bytes_per_second) for hop, each in found.ways.items()
    }
    try:
        return split_by_speed(load_of(model_dir, precision), speeds, ways)
    except InputError as error:
        why = next(iter(found.problems.values()), None)
        raise InputError(f"{error} ({why})" if why else str(error)) from error


def _show(found: Survey, split: MeasuredSplit) -> None:
    """The split as a table, the machines in the order of their stages."""
    heads = ("stage", "machine", "layers", "kernels", "cores", "memory", "reads", "computes")
    rows = [(*heads, "a token", "on to the next")]
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
                f"{machine.description.memory_bytes / (1 << 30):.1f} GiB",
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


def _plan(
    found: Survey,
    split: MeasuredSplit,
    model_dir: Path,
    precision: Precision,
    own: X25519PrivateKey,
) -> Manifest:
    """The manifest of that split, by the model's own files; its parts are cut by it."""
    options = PlanOptions(
        len(split.ends),
        orchestrator_keys=(public_hex(own),),
        precision=precision,
        ends=split.ends,
    )
    with progress_bar("hashing weights") as progress:
        fields = json.loads(dump_manifest(plan(model_dir, options, progress)))
    machines = [found.machines[index] for index in split.order]
    for stage, machine, after in zip(
        fields["stages"], machines, [*machines[1:], None], strict=True
    ):
        stage["machine_keys"] = [machine.address.key.hex()]
        stage["kernels"] = machine.description.kernels
        stage["endpoint"] = {
            "control": _tcp(machine.address.endpoint),
            "data_in": _tcp(_data_in(machine)),
        }
        data_out = machine.home if after is None else _data_in(after)
        if data_out is not None:
            stage["endpoint"]["data_out"] = _tcp(data_out)
    return build_manifest(fields, "cannot plan this")


def _tcp(endpoint: TcpEndpoint) -> dict[str, str]:
    return {"type": "tcp", "addr": str(endpoint).removeprefix("tcp:")}


def _data_in(machine: Surveyed) -> TcpEndpoint:
    return TcpEndpoint(machine.address.endpoint.host, machine.description.data_port)


def _write(manifest: Manifest, flags: JoinFlags, precision: Precision) -> None:
    """Cut the parts beside the manifest's file, and write that once they are there."""
    directory = parts_dir(flags.output)
    new = directory.with_name(directory.name + ".new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        with progress_bar("cutting weights") as progress:
            pinned = cut_model(manifest, flags.model_dir, new, precision, progress)
        shutil.rmtree(directory, ignore_errors=True)
        new.replace(directory)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}") from error
    write_atomically(flags.output, dump_manifest(pinned))
    tell(f"wrote {flags.output}")
