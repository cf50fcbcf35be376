"""A manifest as a batch script for Slurm: each stage a step on the node whose key the manifest has.

The cluster gives processors and memory, starts and stops; what it is told is no secret. A stage
runs where its key lies, so nodes are named, not chosen. A step that fails is started again alone.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.agreement.manifest import Manifest
from pipeline.errors import InputError
from pipeline.placement.rendered.placeable import check_placeable
from pipeline.placement.rendered.stage_needs import StageNeeds
from transport.dial_and_listen import TcpEndpoint

# As Slurm takes names of nodes, partitions and jobs; brackets would be ranges.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,62}", re.ASCII)
_TIME = re.compile(r"[0-9]{1,6}(-[0-9]{1,2})?(:[0-9]{1,2}){0,2}|UNLIMITED", re.ASCII)

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={num_stages}
#SBATCH --nodelist={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={threads}
#SBATCH --mem={memory}M
#SBATCH --time={time}
#SBATCH --no-kill
{partition}\
set -u

# stage NODE MIB COMMAND...: as long as the job runs. What ends by itself (0), cannot be started as
# it is (2) or was told to stop (143) is not started again.
stage() {{
  local node=$1 memory=$2 code
  shift 2
  while :; do
    code=0
    srun --nodes=1 --ntasks=1 --nodelist="$node" --exact --cpus-per-task={threads} \\
      --mem="${{memory}}M" --input=none --label "$@" || code=$?
    case $code in 0 | 2 | 143) return "$code" ;; esac
    sleep 5
  done
}}

children=()
{stages}
# Until the last of them has ended; the job has failed if one of them has.
failed=0
for child in "${{children[@]}}"; do
  wait "$child" || failed=$?
done
exit "$failed"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """What a user says of a job. Raises InputError for what Slurm would not take."""

    manifest_file: Path
    # On every node: of each stage a directory stageI, or the whole model.
    parts: Path
    has_part_directories: bool
    # On a node: a directory stageI with the key that was made there.
    keys: Path
    # Of the stages in order; empty: the hosts of their addresses.
    nodes: Sequence[str] = ()
    name: str = "veilpipe"
    partition: str | None = None
    time: str = "UNLIMITED"
    worker: str = "stage-worker"

    def __post_init__(self) -> None:
        """Check what goes into lines that no shell quotes."""
        checked = [("--name", self.name), ("--partition", self.partition)]
        for flag, text in [*checked, *(("--nodes", node) for node in self.nodes)]:
            if text is not None and not _NAME.fullmatch(text):
                raise InputError(f"{flag} {text[:80]!r}: give letters, digits, dots and dashes")
        if not self.worker:
            raise InputError("--worker is empty; name the command on the nodes")
        if not _TIME.fullmatch(self.time):
            raise InputError(f"--time {self.time[:80]!r}: give minutes, HH:MM:SS or D-HH:MM:SS")

    def command(self, stage_idx: int, needs: StageNeeds) -> list[str]:
        """A stage's worker."""
        own = f"stage{stage_idx}"
        return [
            self.worker,
            f"--manifest={self.manifest_file}",
            f"--stage-idx={stage_idx}",
            f"--model-dir={self.parts / own if self.has_part_directories else self.parts}",
            f"--identity={self.keys / own / 'machine.pem'}",
            *needs.worker_flags,
        ]


def render(manifest: Manifest, job: SlurmJob, needs: Sequence[StageNeeds]) -> str:
    """The script. Raises PolicyError, InputError."""
    check_placeable(manifest)
    for stage in manifest.stages:
        if stage.expected_measurements:
            raise InputError(
                f"stage {stage.stage_idx} runs in an enclave; scripts/run_nitro.sh starts those"
            )
    nodes = _nodes(manifest, job)
    stages = [
        shlex.join(["stage", node, str(each.limit_mib), *job.command(idx, each)])
        + " &\nchildren+=($!)\n"
        for idx, (node, each) in enumerate(zip(nodes, needs, strict=True))
    ]
    return _SCRIPT.format(
        name=job.name,
        num_stages=len(nodes),
        nodes=",".join(nodes),
        threads=max(each.num_threads for each in needs),
        memory=max(each.limit_mib for each in needs),
        time=job.time,
        partition="" if job.partition is None else f"#SBATCH --partition={job.partition}\n",
        stages="".join(stages),
    )


def _nodes(manifest: Manifest, job: SlurmJob) -> list[str]:
    hosts = [_host(manifest, stage.stage_idx) for stage in manifest.stages]
    nodes = list(job.nodes) or hosts
    if len(nodes) != len(hosts):
        raise InputError(f"--nodes names {len(nodes)} nodes for {len(hosts)} stages")
    for node in nodes:
        if not _NAME.fullmatch(node):
            raise InputError(f"{node[:80]!r} is no name of a node; --nodes gives each stage's")
        if nodes.count(node) > 1:
            raise InputError(
                f"node {node} would run {nodes.count(node)} stages; --nodes gives each stage's own"
            )
    return nodes


def _host(manifest: Manifest, stage_idx: int) -> str:
    """Where a stage listens, by the manifest. Raises ManifestError."""
    control = manifest.endpoint(stage_idx).control.to_endpoint()
    assert isinstance(control, TcpEndpoint)  # or it would not be placeable
    return control.host
