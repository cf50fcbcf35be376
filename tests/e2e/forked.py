"""The console commands as processes that need not import themselves: forks of one that has.

What a command does from its first line on is what it does for a user: its arguments, environment,
streams, signals and exit status are its own. Starting the interpreter, of which the tests of
imports, of output and of the scripts take care, is a second of processor time for each process.
"""

import gc
import importlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

COMMANDS = ("stage-worker", "pipeline-orch", "pipeline-relay")
MAX_REQUEST_BYTES = 1 << 20
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)


class Parent:
    """The process that the commands are forks of: theirs to wait for as well."""

    def __init__(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                # A thread that exists when it forks would be missing in the fork.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        self._socket = ours
        self._lock = threading.Lock()

    def start(self, command, environment, directory, streams):
        """The process id of a fork that runs `command` there, on these three descriptors."""
        request = {"command": command, "environment": environment, "directory": directory}
        return self._ask(request, streams)

    def poll(self, pid):
        """The status that a fork has ended with, once."""
        return self._ask({"pid": pid})

    def close(self):
        """End it; forks that run go on."""
        self._socket.close()
        self._process.wait(300)

    def _ask(self, request, descriptors=()):
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer = self._socket.recv(MAX_REQUEST_BYTES)
        assert answer, "the parent of commands has died"
        return json.loads(answer)


class Popen(subprocess.Popen):
    """As its base, for the console commands, which are forks of a parent that has imported them."""

    def __init__(self, parent, command, **options):
        self._parent = parent
        super().__init__(command, **options)

    def _execute_child(self, *arguments):
        given = _SIGNATURE.bind(self, *arguments).arguments
        streams = [
            number if given[name] == -1 else given[name]
            for number, name in enumerate(("p2cread", "c2pwrite", "errwrite"))
        ]
        command = [Path(given["args"][0]).name, *map(str, given["args"][1:])]
        environment, directory = dict(given["env"] or os.environ), os.fspath(given["cwd"] or ".")
        self.pid = self._parent.start(command, environment, directory, streams)
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in names))

    def _try_wait(self, wait_flags):
        while (status := self._parent.poll(self.pid)) is None:
            if wait_flags & os.WNOHANG:
                return 0, 0
            time.sleep(0.005)
        return self.pid, status

    def _internal_poll(self, _deadstate=None):
        if self.returncode is None and self._waitpid_lock.acquire(blocking=False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _serve(ours):
    """Fork for every request to, until nobody makes any; returns in the forks alone."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(ours, MAX_REQUEST_BYTES, 3)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = status if pid else None
        elif answer := os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            ours.close()
            return request, descriptors
        ours.send(json.dumps(answer).encode())


def _become(request, descriptors):
    from pipeline.cli import entry
    from tests.e2e import vsock
    from transport import relay_cli

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["directory"])
    name, *sys.argv[1:] = request["command"]
    sys.argv[0] = name
    os.environ.clear()
    os.environ.update(request["environment"])
    if machine := os.environ.get(vsock.VARIABLE):
        vsock.install(machine)
    commands = (entry.stage_worker, entry.pipeline_orch, relay_cli.main)
    dict(zip(COMMANDS, commands, strict=True))[name]()


def _main():
    sys.path.insert(0, str(Path(__file__).parents[2]))
    for name in ("generate", "pipeline_orch", "serve", "stage_worker"):
        importlib.import_module(f"pipeline.cli.{name}")
    importlib.import_module("transport.relay_cli")
    from pipeline.kernels.kernel_selection import import_kernels

    import_kernels()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as ours:
        request, descriptors = _serve(ours)
    _become(request, descriptors)


if __name__ == "__main__":
    _main()
