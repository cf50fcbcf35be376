"""What a supervisor's workers are forks of: `stage-worker`, imported and not yet told anything."""

import os
import sys

from pipeline.cli.entry import importing, leave_on_signals, settle_libraries
from pipeline.placement.fork_server import end_with, fork_for_requests


def main() -> None:
    """Import, then fork for every request; in the forks, run `stage-worker`."""
    leave_on_signals()
    end_with(os.getppid())  # until there can be forks; before that it would not look up
    # Threads that exist when it forks would be missing in the forks.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    settle_libraries()
    with importing():
        from pipeline.agreement.manifest import Manifest
        from pipeline.cli.stage_worker import main as stage_worker
        from pipeline.cli.worker_flags import WorkerFlags
        from pipeline.kernels.kernel_selection import import_kernels
        from pipeline.models.families import FAMILIES

        import_kernels()
        dict(FAMILIES)  # which imports each
        for model in (Manifest, WorkerFlags):
            model.model_rebuild()
    sys.argv = ["stage-worker", *fork_for_requests()]
    stage_worker()
