"""A tiny model and real processes."""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.manifest import dump_manifest
from pipeline.plan import PlanOptions, plan

BIN = Path(sys.executable).parent


class Ports:
    """A range of free ports, and the claim that keeps other test processes from choosing it."""

    def __init__(self, count):
        for base in random.sample(range(20000, 32000, 100), 120):
            self._claim = (Path(tempfile.gettempdir()) / f"veilpipe-ports-{base}").open("w")
            try:
                fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for port in range(base, base + count):
                    socket.create_server(("127.0.0.1", port)).close()
            except OSError:
                self._claim.close()
            else:
                self.base = base
                return
        raise AssertionError("no free ports")

    def release(self):
        self._claim.close()


class Cluster:
    """Workers and orchestrators of one manifest, as real processes."""

    def __init__(self, directory, model_dir, environment):
        self.directory = directory
        self.model_dir = model_dir
        self.environment = environment
        self.manifest = directory / "manifest.json"
        self.workers = {}
        self.orchestrators = []
        self._ports = []
        self.bin = BIN

    def plan(self, stages, **changes):
        self._ports.append(Ports(10 * stages + 2))
        self.base_port = self._ports[-1].base
        options = PlanOptions(stages, base_port=self.base_port, **changes)
        self.manifest.write_text(dump_manifest(plan(self.model_dir, options)))

    def edit(self, change, path=None):
        raw = json.loads(self.manifest.read_text())
        change(raw)
        path = path or self.manifest
        path.write_text(json.dumps(raw))
        return path

    def start_worker(self, idx, *extra, manifest=None):
        if idx in self.workers:
            self.workers[idx].wait(10)
        log = self.directory / f"stage{idx}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [BIN / "stage-worker", "--manifest", manifest or self.manifest,
                 "--stage-idx", str(idx), "--model-dir", self.model_dir, "--dev", *extra],
                stdout=file, stderr=file, env=self.environment,
            )  # fmt: skip
        self.workers[idx] = process
        return process

    def log(self, idx):
        return (self.directory / f"stage{idx}.log").read_text()

    def wait_for_log(self, idx, text, count=1):
        for _ in range(600):
            if self.log(idx).count(text) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"stage {idx} never logged {text!r}: {self.log(idx)}")

    def worker(self, *arguments):
        return self._run(BIN / "stage-worker", *arguments)

    def orch_command(self, *arguments):
        return self._run(BIN / "pipeline-orch", *arguments)

    def arguments(self, text="Hello there", *extra):
        return [
            "--manifest", self.manifest, "--tokenizer", self.model_dir / "tokenizer.json",
            "--text", text, "--dev", *extra,
        ]  # fmt: skip

    def orch(self, text="Hello there", *extra):
        return self.orch_command(*self.arguments(text, *extra))

    def start_orch(self, text="Hello there", *extra):
        process = subprocess.Popen(
            [BIN / "pipeline-orch", *self.arguments(text, *extra)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environment,
        )  # fmt: skip
        self.orchestrators.append(process)
        return process

    def _run(self, *command):
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=90
        )

    def stop(self):
        try:
            self._end_processes()
        finally:
            for ports in self._ports:
                ports.release()

    def _end_processes(self):
        for process in self.orchestrators:
            process.kill()  # nothing to one that has ended
            process.communicate()
        for process in self.workers.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.workers.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError("a worker did not end on SIGTERM") from None


@contextmanager
def new_cluster(directory, tiny_model):
    model_dir = directory / "model"
    shutil.copytree(tiny_model, model_dir)
    environment = {**os.environ, "VEILPIPE_DEV_DIR": str(directory / "dev")}
    cluster = Cluster(directory, model_dir, environment)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(tmp_path, tiny_model):
    with new_cluster(tmp_path, tiny_model) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory, tiny_model):
    """For tests that leave its processes as they found them."""
    with new_cluster(tmp_path_factory.mktemp("shared"), tiny_model) as cluster:
        yield cluster
