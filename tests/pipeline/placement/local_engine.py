"""An engine whose nodes are threads of one process: keepers as Ray would run them, without Ray.

Run in place of the process that speaks with Ray. A job's address is a directory, in which a test
says what befalls the cluster: a file `node-I` is the loss of the node of stage I, `crash` this
process's own death, `unusable` that there is no such cluster, `full` that no node has room, and
`unreachable` and `silent` that the head answers nothing, at first or later, while they are there.
"""

import os
import sys
import time
from pathlib import Path

from pipeline.placement import fork_server
from pipeline.placement.ray import engine_process
from pipeline.placement.ray.engine import EngineError, EngineUnusable
from pipeline.placement.ray.keeper import StageKeeper

STUB = Path(__file__).with_name("stub_worker.py")


class LocalEngine:
    def __init__(self, job):
        self.job = job
        self.events = Path(job.address)
        self.keepers = {}

    def connect(self):
        if (self.events / "unusable").exists():
            raise EngineUnusable("no such cluster")
        self.wait_for_the_end_of("unreachable")

    def keep(self, stage_idx):
        if not self.is_full():
            self.keepers[stage_idx] = StageKeeper(
                stage_idx, self.job.core, self.job.arguments[stage_idx], "127.0.0.1"
            )

    def report(self, stage_idx, seen):
        if self.happens("crash"):
            os._exit(7)
        if stage_idx not in self.keepers:
            self.keep(stage_idx)
        if stage_idx not in self.keepers:
            raise EngineError("a stage takes GPU 1 of one node, and the 3 nodes have GPU 0 at most")
        if self.happens(f"node-{stage_idx}"):
            self.keepers.pop(stage_idx).stop()
            raise EngineError("the node is gone")
        return self.keepers[stage_idx].report(seen)

    def lose(self, stage_idx, kind):
        self.keepers[stage_idx].lose(kind)

    def check(self):
        self.wait_for_the_end_of("silent")

    def close(self):
        for keeper in self.keepers.values():
            keeper.stop()

    def is_full(self):
        return (self.events / "full").exists()

    def wait_for_the_end_of(self, name):
        while (self.events / name).exists():
            time.sleep(0.01)

    def happens(self, name):
        """Once, and to whoever sees it first."""
        try:
            (self.events / name).unlink()
        except FileNotFoundError:
            return False
        return True


def main():
    fork_server.COMMAND = (sys.executable, "-S", str(STUB))
    engine_process.CHECK_SECONDS = 0.05
    engine_process.SILENT_SECONDS = 0.2
    engine_process.run(LocalEngine)
