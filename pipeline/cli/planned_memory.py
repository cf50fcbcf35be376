"""What `plan` says of the memory of the machines it plans for."""

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.agreement.manifest import Manifest, StageSpec
from pipeline.cli.logs import tell
from pipeline.errors import InputError
from pipeline.gateway.auth import is_local_name
from pipeline.kernels.host_memory import available_bytes
from pipeline.units import GIB
from transport.dial_and_listen import TcpEndpoint


def machine_sizes(text: str, num_stages: int) -> list[int]:
    """Bytes of each stage's machine, in GiB as a flag says them. Raises InputError."""
    given = text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,6}(\.[0-9]{1,6})? *", each) for each in given):
        raise InputError(f"--memory {text[:80]!r}: give GiB, one number or one for each stage")
    if len(given) not in (1, num_stages):
        raise InputError(f"--memory has {len(given)} machines for {num_stages} stages")
    sizes = [int(float(each) * GIB) for each in given]
    return sizes if len(sizes) == num_stages else sizes * num_stages


def tell_memory(manifest: Manifest, model_dir: Path, sizes: Sequence[int] | None) -> None:
    """A line for each stage: weights, and the tokens there is room for beside them.

    `sizes`: bytes of each stage's machine; without them, of stages here. Raises ModelError.
    """
    from pipeline.planning.stage_memory import stage_memory

    if sizes is not None:
        machines = dict(enumerate(sizes))
    elif (free := available_bytes()) is not None:
        machines = {each.stage_idx: free for each in manifest.stages if _is_here(each)}
    else:
        machines = {}
    context = manifest.activation_spec.max_seq_len
    for stage in stage_memory(manifest, model_dir, "float32", machines):
        tell("pipeline-orch", stage.told(context))


def _is_here(stage: StageSpec) -> bool:
    """Whether a stage's worker would run on this machine, and not in an enclave of its."""
    if stage.endpoint is None:
        return False
    endpoint = stage.endpoint.data_in.to_endpoint()
    return isinstance(endpoint, TcpEndpoint) and is_local_name(endpoint.host)
