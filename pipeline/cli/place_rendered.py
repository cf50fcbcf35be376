"""`pipeline-orch place k8s` and `place slurm`: stages for engines that others run, as files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

from pipeline.agreement.manifest import Manifest, load_manifest
from pipeline.cli.logs import tell
from pipeline.cli.model_directory import model_option
from pipeline.cli.shard_directories import has_parts, model_or_parts, stage_dir
from pipeline.cli.shared_options import ManifestOption
from pipeline.errors import InputError
from pipeline.files import write_atomically
from pipeline.placement.rendered.placeable import check_placeable
from pipeline.placement.rendered.stage_needs import StageNeeds

# Tokens that a text is planned to have at most, where a model can go on for longer.
USUAL_CONTEXT = 4096

ModelOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR|NAME",
        callback=model_option,
        help="The model, or what shard made of it; its config.json is read [beside the manifest].",
    ),
]
ThreadsOption = Annotated[
    int, typer.Option(min=1, max=1024, metavar="N", help="Threads, and CPUs, of each stage.")
]
BatchOption = Annotated[
    int, typer.Option(min=1, max=1024, metavar="N", help="Texts at once that memory is for.")
]
ContextOption = Annotated[
    int | None,
    typer.Option(min=2, max=1 << 24, metavar="N", help="Tokens of each [4096, or the model's]."),
]
NameOption = Annotated[str, typer.Option(metavar="NAME", help="What the pipeline is called there.")]


def k8s_command(
    manifest: ManifestOption,
    image: Annotated[str, typer.Option(metavar="REF", help="Of `python -m enclave container`.")],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="DIR", help="A new directory.")
    ],
    model_dir: ModelOption = None,
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="leaderworkerset, or statefulset.")
    ] = "leaderworkerset",
    name: NameOption = "veilpipe",
    namespace: Annotated[str, typer.Option(metavar="NAME", help="Where all of it is.")] = "default",
    claim: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="PersistentVolumeClaim with the parts [NAME-parts]."),
    ] = None,
    keys_path: Annotated[
        str, typer.Option(metavar="DIR", help="On nodes: directories stageI, each with its key.")
    ] = "/var/lib/veilpipe",
    secret: Annotated[
        str | None, typer.Option(metavar="NAME", help="Secret whose keys are workers' variables.")
    ] = None,
    pull_secret: Annotated[
        str | None, typer.Option(metavar="NAME", help="Secret that images are pulled with.")
    ] = None,
    orchestrator: Annotated[
        list[str] | None,
        typer.Option(metavar="CIDR", help="Orchestrators come from there, too; repeatable."),
    ] = None,
    threads: ThreadsOption = 1,
    max_batch: BatchOption = 16,
    context: ContextOption = None,
    enclave_image: Annotated[
        str | None, typer.Option(metavar="REF", help="Has nitro-cli, for stages in enclaves.")
    ] = None,
    enclave_group: Annotated[
        int, typer.Option(min=0, max=(1 << 31) - 1, metavar="GID", help="Of /dev/nitro_enclaves.")
    ] = 0,
    enclave_seccomp: Annotated[
        str, typer.Option(metavar="FILE", help="Nodes' profile that allows AF_VSOCK.")
    ] = "veilpipe-vsock.json",
) -> None:
    """Write what `kubectl apply -f DIR` takes, and DIR/orchestrator/manifest.json for here.

    A LeaderWorkerSet, or a StatefulSet for each stage; services, network policies, probes, and
    requests for what the plan needs. pipeline/placement/rendered/README.md tells how it is used.

    \b
        pipeline-orch place k8s --manifest shards/manifest.json --image REGISTRY/veilpipe:1 -o k8s
    """
    from pipeline.placement.rendered.k8s.cluster import Cluster, Kind
    from pipeline.placement.rendered.k8s.rendering import write

    cluster = Cluster(
        image=image,
        kind=cast(Kind, kind),
        name=name,
        namespace=namespace,
        claim=f"{name}-parts" if claim is None else claim,
        keys_path=keys_path,
        secret=secret,
        pull_secret=pull_secret,
        networks=tuple(orchestrator or ()),
        enclave_image=enclave_image,
        enclave_group=enclave_group,
        enclave_seccomp=enclave_seccomp,
    )
    loaded = load_manifest(manifest)
    needs = _needs(loaded, _model(model_dir, manifest), threads, max_batch, context)
    for path in write(loaded, cluster, needs, output):
        tell("pipeline-orch", f"wrote {path}")


def slurm_command(
    manifest: ManifestOption,
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="For sbatch.")
    ],
    model_dir: ModelOption = None,
    parts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="That directory's path on the nodes [the same]."),
    ] = None,
    keys_path: Annotated[
        Path, typer.Option(metavar="DIR", help="On nodes: directories stageI, each with its key.")
    ] = Path("/var/lib/veilpipe"),
    nodes: Annotated[
        str | None,
        typer.Option(metavar="NODE,NODE...", help="Each stage's, in order [manifest's hosts]."),
    ] = None,
    name: NameOption = "veilpipe",
    partition: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where the job is queued [Slurm's].")
    ] = None,
    time: Annotated[str, typer.Option(metavar="TIME", help="Its limit.")] = "UNLIMITED",
    worker: Annotated[
        str, typer.Option(metavar="PATH", help="The command on the nodes.")
    ] = "stage-worker",
    threads: ThreadsOption = 1,
    max_batch: BatchOption = 16,
    context: ContextOption = None,
) -> None:
    """Write a batch script that runs each stage as a step, on the node that has its key.

    \b
        pipeline-orch place slurm --manifest shards/manifest.json -o stages.sbatch
        sbatch stages.sbatch
    """
    from pipeline.placement.rendered.slurm import SlurmJob, render

    loaded, model = load_manifest(manifest), _model(model_dir, manifest)
    job = SlurmJob(
        manifest_file=manifest.absolute(),
        parts=(parts or model).absolute(),
        has_part_directories=has_parts(model),
        keys=keys_path.absolute(),
        nodes=tuple(each.strip() for each in nodes.split(",")) if nodes is not None else (),
        name=name,
        partition=partition,
        time=time,
        worker=worker,
    )
    needs = _needs(loaded, model, threads, max_batch, context)
    write_atomically(output, render(loaded, job, needs))
    tell("pipeline-orch", f"wrote {output}")


def _model(given: Path | None, manifest: Path) -> Path:
    """The model, what `join` keeps of it, or the parts beside the manifest. Raises InputError."""
    if given is None and has_parts(manifest.parent):
        return manifest.parent
    return model_or_parts(given, manifest, "--model-dir")


def _needs(
    manifest: Manifest, model_dir: Path, threads: int, max_batch: int, context: int | None
) -> Sequence[StageNeeds]:
    """What each stage takes. Raises PolicyError, InputError, ModelError."""
    from pipeline.planning.stage_sizes import stage_sizes

    check_placeable(manifest)  # first, since it says what a manifest lacks
    longest = manifest.activation_spec.max_seq_len
    if context is not None and context > longest:
        raise InputError(f"--context {context}: the manifest has {longest} at most")
    length = context or min(longest, USUAL_CONTEXT)
    return [
        StageNeeds(
            *stage_sizes(manifest, idx, stage_dir(model_dir, idx), max_batch, length), threads
        )
        for idx in range(len(manifest.stages))
    ]
