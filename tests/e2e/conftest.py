"""A tiny model and real processes."""

import fcntl
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import httpx
import pytest

from pipeline.agreement.manifest import dump_manifest
from pipeline.cli import door_server, pipeline_orch, stage_worker
from pipeline.planning.plan import PlanOptions, plan
from tests.e2e import forked
from tests.e2e.processes import end

BIN = Path(sys.executable).parent
# Of a pipe that is to take little: the least that there is.
PIPE_BYTES = 4096
# What a fork can be told of its start.
FORKABLE = {"stdin", "stdout", "stderr", "env", "cwd", "text", "bufsize", "pipesize"}


def expect(result, code, *words):
    assert result[0] == code, result[1]
    for word in words:
        assert word in result[1]


class Ports:
    """A range of free ports, and the claim that keeps other test processes from choosing it."""

    def __init__(self, count):
        for base in random.sample(range(20000, 32000, 100), 120):
            with ExitStack() as claim, suppress(OSError):  # another's, perhaps another user's
                path = Path(tempfile.gettempdir()) / f"veilpipe-ports-{base}"
                file = claim.enter_context(path.open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for port in range(base, base + count):
                    socket.create_server(("127.0.0.1", port)).close()
                self.base = base
                self._claim = claim.pop_all()
                return
        raise AssertionError("no free ports")

    def release(self):
        self._claim.close()


class Log:
    """What processes write to a file, from now on."""

    def __init__(self, path):
        self._path = path
        path.touch()
        self._start = self._begin = path.stat().st_size

    def begin(self):
        """Forget what has been written."""
        self._begin += len(self.text().encode())

    def text(self):
        return self._lines(self._begin)

    def whole(self):
        """With what has been forgotten."""
        return self._lines(self._start)

    def _lines(self, begin):
        """Whole ones only: what is being written can be seen half done."""
        written = self._path.read_bytes()[begin:]
        return written[: written.rfind(b"\n") + 1].decode()


class Server:
    """`pipeline-orch serve` in front of a cluster's stages."""

    def __init__(self, cluster, *extra, headers=None, **options):
        self.headers = headers
        path = cluster.directory / "serve.log"
        self._log = Log(path)
        with path.open("ab") as file:
            self.process = cluster.popen(
                [BIN / "pipeline-orch", "serve", "--manifest", cluster.manifest,
                 "--model-dir", cluster.model_dir, "--port", "0", "--dev", "--max-batch", "8",
                 *extra],
                stdout=file, stderr=file, env=cluster.environment, **options,
            )  # fmt: skip
        self.url = None

    def wait_until_listening(self):
        self.url = self.wait_for(lambda: re.search(r"url\W+(http://[\w.:]+)", self.log()))[1]

    def begin(self):
        """Forget what has been logged."""
        self._log.begin()

    def log(self):
        return self._log.text()

    def events(self, name):
        """The lines of one event, where lines are JSON."""
        lines = [json.loads(line) for line in self.log().splitlines()]
        return [line for line in lines if line.get("event") == name]

    def workers(self):
        """Process ids of supervised workers by stage, the latest of each."""
        started = re.findall(
            r'worker_started\W.*?stage"?\W+(\d+).*?pid"?\W+(\d+)', self._log.whole()
        )
        return {int(idx): int(pid) for idx, pid in started}

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for(self, condition, seconds=300):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := condition():
                return found
            assert self.process.poll() is None, self.log()
            time.sleep(0.02)
        raise AssertionError(self.log()[-5000:])

    def wait_for_log(self, text, count):
        self.wait_for(lambda: self.log().count(text) >= count)

    def get(self, path, timeout=300):
        return httpx.get(f"{self.url}{path}", headers=self.headers, timeout=timeout)

    def post(self, body, path="/v1/completions"):
        answer = httpx.post(f"{self.url}{path}", json=body, headers=self.headers, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer

    @staticmethod
    def wish(prompt, max_tokens, **more):
        """The body of a request for exactly so many tokens."""
        return {"model": "model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
                "ignore_eos": True} | more  # fmt: skip

    def text(self, prompt, max_tokens, **more):
        """What is completed."""
        answer = self.post(self.wish(prompt, max_tokens, **more))
        return answer.json()["choices"][0]["text"]

    def pipeline(self):
        return self.get("/pipeline").raise_for_status().json()

    def num_running(self):
        return self.pipeline()["engine"]["num_running"]

    def num_taken(self):
        """Requests that run, or wait for a step that they can run from."""
        engine = self.pipeline()["engine"]
        return engine["num_running"] + engine["num_waiting"]

    def stop(self):
        assert end(self.process) == 0


class Cluster:
    """Workers, orchestrators and servers of one manifest, as real processes."""

    def __init__(self, directory, model_dir, environment, parent=None):
        self._parent = parent
        self.directory = directory
        self.model_dir = model_dir
        self.environment = environment
        self.manifest = directory / "manifest.json"
        self.workers = {}
        self.orchestrators = []
        self.servers = []
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

    def start_worker(self, idx, *extra, manifest=None, within=()):
        if idx in self.workers:
            self.workers[idx].wait(300)
        log = self.directory / f"stage{idx}.log"
        with log.open("ab") as file:
            process = self.popen(
                [*within, BIN / "stage-worker", "--manifest", manifest or self.manifest,
                 "--stage-idx", str(idx), "--model-dir", self.model_dir, "--dev", *extra],
                stdout=file, stderr=file, env=self.environment,
            )  # fmt: skip
        self.workers[idx] = process
        return process

    def end_workers(self):
        for process in self.workers.values():
            end(process)
        self.workers.clear()

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

    def orch_command(self, *arguments, **options):
        return self._run(BIN / "pipeline-orch", *arguments, **options)

    def arguments(self, text="Hello there", *extra):
        return [
            "--manifest", self.manifest, "--tokenizer", self.model_dir / "tokenizer.json",
            "--text", text, "--dev", *extra,
        ]  # fmt: skip

    def orch(self, text="Hello there", *extra):
        return self.orch_command(*self.arguments(text, *extra))

    def orch_over(self, stages, *extra, text="Hello there", flags=()):
        """`orch` over workers that are started for it alone, with these flags."""
        for idx in range(stages):
            self.start_worker(idx, "--once", *flags)
        return self.orch(text, *extra)

    def start_orch(self, text="Hello there", *extra):
        """One that cannot end a text of thousands of bytes before that is read."""
        process = self.popen(
            [BIN / "pipeline-orch", *self.arguments(text, *extra)],
            stdout=PIPE, stderr=PIPE, bufsize=0, pipesize=PIPE_BYTES, env=self.environment,
        )  # fmt: skip
        self.orchestrators.append(process)
        return process

    def serve(self, *extra, **options):
        server = self.begin_to_serve(*extra, **options)
        server.wait_for(server.is_ready)
        return server

    def begin_to_serve(self, *extra, **options):
        """A server that listens; its stages may never be ready."""
        server = Server(self, *extra, **options)
        self.servers.append(server)
        server.wait_until_listening()
        return server

    def _run(self, *command, stdin=None, text=True, cwd=None):
        with self.popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=text, env=self.environment, cwd=cwd
        ) as process:
            try:
                stdout, stderr = process.communicate(stdin, timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def popen(self, command, **options):
        """Start a console command, or any other."""
        is_ours = Path(command[0]).parent == BIN and Path(command[0]).name in forked.COMMANDS
        if self._parent is None or not is_ours or options.keys() - FORKABLE:
            return subprocess.Popen(command, **options)
        return forked.Popen(self._parent, command, **options)

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
        with ExitStack() as ending:  # servers first; each is ended, whatever becomes of others
            for process in self.workers.values():
                ending.callback(end, process)
            for server in self.servers:
                if server.process.poll() is None:
                    ending.callback(server.stop)


@contextmanager
def new_cluster(directory, tiny_model, parent=None):
    model_dir = directory / "model"
    shutil.copytree(tiny_model, model_dir)
    environment = {**os.environ, "VEILPIPE_DEV_DIR": str(directory / "dev")}
    cluster = Cluster(directory, model_dir, environment, parent)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def command_parent():
    parent = forked.Parent()
    yield parent
    parent.close()


@pytest.fixture
def cluster(tmp_path, tiny_model, command_parent):
    with new_cluster(tmp_path, tiny_model, command_parent) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory, tiny_model, command_parent):
    """For tests that leave its processes as they found them."""
    with new_cluster(tmp_path_factory.mktemp("shared"), tiny_model, command_parent) as cluster:
        yield cluster


@pytest.fixture
def command(capfd, monkeypatch):
    """Runs a console command in this process: (exit code, stderr lines with 'error:')."""

    def run(module, *arguments):
        names = {stage_worker: "stage-worker", door_server: "stage-worker door"}
        name = names.get(module, "pipeline-orch")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            module.main()
        stderr = capfd.readouterr().err
        assert "Traceback" not in stderr
        errors = [line for line in stderr.splitlines() if f"{name}: error:" in line]
        assert len(errors) == 1, stderr
        return caught.value.code, errors[0]

    return run


@pytest.fixture
def worker(command, cluster):
    cluster.plan(2)

    def run(*extra, stage_idx=0, manifest=None, dev=True):
        return command(
            stage_worker, "--manifest", manifest or cluster.manifest, "--stage-idx", stage_idx,
            "--model-dir", cluster.model_dir, *(["--dev"] if dev else []), *extra,
        )  # fmt: skip

    return run


@pytest.fixture
def orch(command, cluster):
    cluster.plan(1)

    def run(text="Hi", *extra):
        return command(pipeline_orch, *cluster.arguments(text, *extra))

    return run
