"""What is asked of an engine that runs keepers, and Ray as one."""

import os
import re
from collections.abc import Sequence
from typing import Any, Protocol

from pipeline.errors import PipelineError
from pipeline.placement.ray.keeper import StageKeeper, end_with
from pipeline.placement.ray.messages import Job, LossKind
from pipeline.placement.ray.shortage import shortage

# The first that has its clusters ask for a token.
OLDEST = (2, 52)
# For a keeper that reports once a second.
ANSWER_SECONDS = 3.0
STOP_SECONDS = 10.0


class EngineError(PipelineError):
    """The engine, or one of its keepers, does not do what it is asked now."""


class EngineUnusable(EngineError):
    """Nor will it, however often it is asked."""


class Engine(Protocol):
    """Where keepers run. All of this may block, and is called in threads."""

    def connect(self) -> None:
        """Find the cluster. Raises EngineUnusable."""
        ...

    def keep(self, stage_idx: int) -> None:
        """Have a keeper for the stage somewhere, and elsewhere when it is lost."""
        ...

    def report(self, stage_idx: int, seen: int) -> tuple[int, str]:
        """`StageKeeper.report` of the stage's. Raises EngineError where there is none now."""
        ...

    def lose(self, stage_idx: int, kind: LossKind) -> None:
        """`StageKeeper.lose` of the stage's, or another keeper where that does not answer."""
        ...

    def check(self) -> None:
        """Return once the cluster has answered. Raises EngineError."""
        ...

    def close(self) -> None:
        """End all keepers and their workers."""
        ...


class RayEngine:
    """Keepers are actors, each in a bundle of one placement group.

    Ray is imported where it is connected to, and nowhere else in the project.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ray: Any = None
        self._group: Any = None
        self._keepers: dict[int, Any] = {}
        # Reports that are awaited, of keepers that are not there yet.
        self._awaited: dict[int, Any] = {}

    def connect(self) -> None:
        """Join the cluster. Raises EngineUnusable."""
        try:
            import ray  # noqa: PLC0415  (not everybody has it)

            ray.__version__  # noqa: B018  (what a removed one leaves behind imports as well)
        except (ImportError, AttributeError) as error:
            raise EngineUnusable(
                "Ray is not installed here; `pip install 'veilpipe[ray]'` has it"
            ) from error
        version = re.match(r"(\d+)\.(\d+)", ray.__version__)
        if version is None or (int(version[1]), int(version[2])) < OLDEST:
            raise EngineUnusable(f"Ray {ray.__version__} asks for no token; install 2.52 or newer")
        job = self._job
        try:
            ray.init(address=job.address, log_to_driver=False, logging_level="ERROR")
            bundles = [dict(job.needs) for _ in job.arguments]
            self._group = ray.util.placement_group(bundles, strategy=job.strategy, name="veilpipe")
        except ConnectionError as error:  # Ray says the same of both
            raise EngineUnusable(
                f"{first_line(error)}: nothing answers there, or it asks for another token than "
                "RAY_AUTH_TOKEN or ~/.ray/auth_token has"
            ) from error
        except Exception as error:  # Ray's own have no root in common
            raise EngineUnusable(first_line(error)) from error
        self._ray = ray

    def keep(self, stage_idx: int) -> None:
        """Have Ray make the stage's actor, and make it again wherever it is lost."""
        ray, job = self._ray, self._job
        needs = dict(job.needs)
        in_bundle = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=stage_idx
        )
        actor = ray.remote(RayKeeper).options(
            num_cpus=needs.pop("CPU", 0),
            memory=needs.pop("memory", None),
            resources=needs,
            scheduling_strategy=in_bundle,
            max_restarts=-1,
            max_task_retries=0,
            # To be told of a loss while others wait for a report.
            max_concurrency=4,
        )
        self._keepers[stage_idx] = actor.remote(stage_idx, job.core, job.arguments[stage_idx])

    def report(self, stage_idx: int, seen: int) -> tuple[int, str]:
        """Wait for the actor's. Raises EngineError."""
        ray = self._ray
        awaited = self._awaited.pop(stage_idx, None)
        if awaited is None:
            awaited = self._keepers[stage_idx].report.remote(seen)
        if not ray.wait([awaited], timeout=ANSWER_SECONDS)[0]:
            self._awaited[stage_idx] = awaited
            raise EngineError(self._shortage() or "no node keeps it yet")
        try:
            version, kept = ray.get(awaited)
        except ray.exceptions.ActorDiedError as error:
            self.keep(stage_idx)
            raise EngineError(first_line(error)) from error
        except ray.exceptions.ActorUnavailableError as error:
            raise EngineError("its keeper is gone, or the node that had it") from error
        except ray.exceptions.RayError as error:
            raise EngineError(first_line(error)) from error
        return int(version), str(kept)

    def lose(self, stage_idx: int, kind: LossKind) -> None:
        """Tell the actor, or have Ray end it where it does not hear."""
        ray, keeper = self._ray, self._keepers[stage_idx]
        if not ray.wait([keeper.lose.remote(kind)], timeout=ANSWER_SECONDS)[0]:
            ray.kill(keeper, no_restart=False)

    def check(self) -> None:
        """Ask the head which nodes there are. Raises EngineError."""
        try:
            self._ray.nodes()
        except Exception as error:  # as above
            raise EngineError(first_line(error)) from error

    def close(self) -> None:
        """End the actors, and have Ray forget where they were."""
        ray = self._ray
        if ray is None:
            return
        stopping = [keeper.stop.remote() for keeper in self._keepers.values()]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=STOP_SECONDS)
        for keeper in self._keepers.values():
            ray.kill(keeper)
        ray.util.remove_placement_group(self._group)
        ray.shutdown()

    def _shortage(self) -> str | None:
        """None as well where the head does not tell: `check` says that."""
        ray, job, num_stages = self._ray, self._job, len(self._job.arguments)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            free = ray.available_resources()
            state = ray.util.placement_group_table(self._group)["state"]
        except Exception:  # as above
            return None
        # A group gets its place as a whole, and later one for each stage that has lost its own.
        num_missing = num_stages if state == "PENDING" else 1
        return shortage(job.needs, num_stages, job.strategy, nodes, free, num_missing)


class RayKeeper(StageKeeper):
    """A keeper at the address by which Ray knows its node."""

    def __init__(self, stage_idx: int, core: str, arguments: Sequence[str]) -> None:
        """Raises ManifestError."""
        import ray  # noqa: PLC0415

        super().__init__(stage_idx, core, arguments, ray.util.get_node_ip_address())
        end_with(os.pidfd_open(os.getppid()), self.stop)


def first_line(error: Exception) -> str:
    """Of what is often a page."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
