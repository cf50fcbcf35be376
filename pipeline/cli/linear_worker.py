"""`stage-worker linear`: multiply what a stage sends by public weights, and see only noise."""

from pathlib import Path
from typing import Annotated

from pipeline.agreement.manifest import load_manifest
from pipeline.cli.compute_options import ThreadsFlag
from pipeline.cli.error_reporting import new_app, run_app
from pipeline.cli.part_worker import PartFlags, serve_part
from pipeline.cli.progress import progress_bar
from pipeline.cli.settings import Flag, takes_flags
from pipeline.kernels.runtime import set_num_threads

KINDS = ("linear", "mixed-linear")

app = new_app()


class LinearFlags(PartFlags):
    """And what it multiplies by."""

    model_dir: Annotated[Path, Flag("DIR", "config.json and *.safetensors of the model.")]
    threads: ThreadsFlag = None


@app.command()
@takes_flags(flags=LinearFlags)
def linear(flags: LinearFlags) -> None:
    """Multiply rows that a manifest's stage sends by the weights of its linears.

    The worker holds public weights; whatever it is sent is hidden under masks, or mixed. It checks
    the weights' hashes, prints `event=listening` and serves one session after another, or several
    side by side, until stopped.

    \b
        stage-worker linear --manifest manifest.json --model-dir models/smollm2 --dev
    """
    from pipeline.offload.held_model import load_linears
    from pipeline.offload.linear_wire import LIMITS
    from pipeline.offload.linear_worker import LinearWorker
    from pipeline.stage.model_config import agreed_config

    manifest = load_manifest(flags.manifest)
    kind = KINDS[0]
    if manifest.part is not None and manifest.part.kind in KINDS:
        kind = manifest.part.kind
    set_num_threads(flags.threads or 1)
    config = agreed_config(manifest, flags.model_dir)
    with progress_bar("loading weights") as progress:
        linears = load_linears(manifest, config, flags.model_dir, progress)
    serve_part(flags, kind, LIMITS, lambda: LinearWorker(linears))


def main() -> None:
    """Console entry point."""
    run_app(app, "stage-worker linear")
