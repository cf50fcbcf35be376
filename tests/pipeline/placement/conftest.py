"""Placements of two stages each, alive, with what befalls their workers from outside."""

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from pipeline.agreement.manifest import build_manifest, dump_manifest
from pipeline.placement import fork_server
from pipeline.placement.by_hand import ByHand
from pipeline.placement.free_ports import FreePortSupervisor
from pipeline.placement.ray import placement as ray_placement
from pipeline.placement.ray.messages import Job
from pipeline.placement.ray.placement import RayPlacement
from pipeline.placement.worker_supervisor import Supervisor
from tests.pipeline.placement.local_engine import STUB

ROOT = Path(__file__).resolve().parents[3]
WORKER = (sys.executable, "-S", str(STUB))
ENGINE = "tests.pipeline.placement.local_engine"
LOCAL_ENGINE = (
    sys.executable, "-c",
    f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom {ENGINE} import main\nmain()",
)  # fmt: skip


def manifest_at(directory):
    """Two stages at sockets of that directory; of no model."""

    def unix(name):
        return {"type": "unix", "path": str(directory / name)}

    stages = [
        {
            "stage_idx": idx, "layer_start": idx, "layer_end": idx + 1,
            "endpoint": {"control": unix(f"c{idx}"), "data_in": unix(f"d{idx}"),
                         "data_out": unix(f"d{idx + 1}")},
        }
        for idx in range(2)
    ]  # fmt: skip
    spec = {"dtype": "F32", "hidden_dim": 4, "max_seq_len": 8}
    fields = {"model_name": "m", "model_version": "1", "total_layers": 2, "stages": stages,
              "activation_spec": spec}  # fmt: skip
    return build_manifest(fields, "test")


def listening_at(manifest, idx):
    """A stub's flags for a stage of it."""
    endpoint = manifest.endpoint(idx)
    at = endpoint.control.to_endpoint(), endpoint.data_in.to_endpoint()
    return ("--control-listen", str(at[0]), "--data-in-listen", str(at[1]))


class Home:
    """A placement, and who is at the addresses that it names."""

    # Whether it sees itself to stages that hang, and to their end.
    supervises = True

    def __init__(self, placement):
        self.placement = placement

    async def who(self, idx, name="control"):
        """The process at a stage's address; None where nobody answers."""
        address = getattr(self.placement.where(idx), name)
        endpoint = address.to_endpoint()
        try:
            if address.type == "unix":
                stream = await trio.open_unix_socket(endpoint.path)
            else:
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
            async with stream:
                said = b"".join([data async for data in stream])
        except (OSError, trio.BrokenResourceError):
            return None
        return int(said) if said else None

    async def other_than(self, idx, *known):
        """Somebody else at a stage's address, sooner or later."""
        while (found := await self.who(idx)) in {None, *known}:  # noqa: ASYNC110 - others
            await trio.sleep(0.01)
        return found

    async def kill(self, idx):
        """The death of a stage's process; whoever sees to it has another one run."""
        pid = await self.other_than(idx)
        os.kill(pid, signal.SIGKILL)
        return pid


class SupervisedHome(Home):
    @classmethod
    @asynccontextmanager
    async def open(cls, directory, monkeypatch):
        monkeypatch.setattr(fork_server, "COMMAND", WORKER)
        manifest = manifest_at(directory)
        async with trio.open_nursery() as nursery:
            yield cls(Supervisor(manifest, lambda idx: listening_at(manifest, idx), nursery))
            nursery.cancel_scope.cancel()


class HomeBesideOthers(Home):
    """Supervised, wherever there is room: others may listen where the manifest says."""

    @classmethod
    @asynccontextmanager
    async def open(cls, directory, monkeypatch):
        monkeypatch.setattr(fork_server, "COMMAND", WORKER)
        async with trio.open_nursery() as nursery:
            yield cls(FreePortSupervisor(manifest_at(directory), lambda _: (), nursery))
            nursery.cancel_scope.cancel()


class HomeByHand(Home):
    """Somebody starts each worker where it was not before, and corrects the manifest's file."""

    supervises = False

    @classmethod
    @asynccontextmanager
    async def open(cls, directory, monkeypatch):
        del monkeypatch
        manifest = manifest_at(directory)
        path = directory / "manifest.json"
        path.write_text(dump_manifest(manifest))
        home = cls(ByHand(manifest, path))
        home.directory, home.path, home.manifest = directory, path, manifest
        home.processes = []
        for idx in range(2):
            home.run_worker(idx)
        yield home
        for process in home.processes:
            process.kill()
            process.communicate()

    def run_worker(self, idx):
        command = (*WORKER, *listening_at(self.manifest, idx))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        self.processes.append(subprocess.Popen(command, **pipes))

    async def kill(self, idx):
        pid = await super().kill(idx)
        moved = self.directory / f"moved{len(self.processes)}"
        moved.mkdir()
        stages = list(self.manifest.stages)
        now = manifest_at(moved).stages[idx].endpoint
        now = now.model_copy(update={"data_out": stages[idx].endpoint.data_out})
        stages[idx] = stages[idx].model_copy(update={"endpoint": now})
        self.manifest = self.manifest.model_copy(update={"stages": tuple(stages)})
        self.run_worker(idx)
        self.path.write_text(dump_manifest(self.manifest))
        return pid


def job_of(directory, *more):
    """Two stages of a cluster whose events are in that directory."""
    core = dump_manifest(manifest_at(directory))
    return Job(
        address=str(directory), strategy="SPREAD", needs={"CPU": 1.0}, core=core,
        arguments=(more, more),
    )  # fmt: skip


class RayHome(Home):
    """What runs with Ray, with an engine of one process in Ray's place."""

    @classmethod
    @asynccontextmanager
    async def open(cls, directory, monkeypatch, *more):
        monkeypatch.setattr(ray_placement, "COMMAND", LOCAL_ENGINE)
        job = job_of(directory, *more)
        async with trio.open_nursery() as nursery:
            home = cls(RayPlacement(job, nursery))
            home.directory, home.nursery = directory, nursery
            yield home
            nursery.cancel_scope.cancel()

    def happens(self, name):
        """An event of the cluster; see the engine."""
        (self.directory / name).touch()


HOMES = {
    "supervised": SupervisedHome, "beside others": HomeBesideOthers, "by hand": HomeByHand,
    "ray": RayHome,
}  # fmt: skip


@pytest.fixture(params=HOMES)
async def home(request, tmp_path, monkeypatch):
    """A home of each kind, its stages started."""
    with trio.fail_after(120):
        async with HOMES[request.param].open(tmp_path, monkeypatch) as home:
            for idx in range(2):
                await home.placement.start(idx)
            yield home
