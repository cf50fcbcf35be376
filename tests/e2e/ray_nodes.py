"""A Ray cluster on this machine: a head without resources, and nodes that come and go.

Run as a program it says where the head is, and then obeys a line of stdin each: a number of nodes
there are to be, answered with the process ids of their raylets. It ends with stdin.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Lost nodes are noticed within two seconds, not twenty.
TUNED = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "800",
    "RAY_health_check_failure_threshold": "3",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Without it Ray takes 127.0.0.1 for this machine's other address, where no head listens.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
# Of each node: nobody uses its object store.
HERE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20}


class RayNodes:
    """The program, and what a test asks of it."""

    def __init__(self, directory, num_nodes, cpus=2):
        self.environment = {
            **os.environ, **TUNED, "RAY_AUTH_TOKEN": "t" * 40,
            "RAY_TMPDIR": f"/tmp/ray-{os.getpid()}",
            "VEILPIPE_DEV_DIR": str(directory / "dev"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }  # fmt: skip
        self.log = (directory / "ray.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(cpus)], env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, bufsize=1,
        )  # fmt: skip
        self.head = self.hear()
        self.address = self.head["address"]
        self.have(num_nodes)

    def hear(self):
        line = self.process.stdout.readline()
        assert line, Path(self.log.name).read_text()[-2000:]
        return json.loads(line)

    def have(self, num_nodes):
        """The raylets of that many nodes, once they are there."""
        print(num_nodes, file=self.process.stdin)
        self.raylets = self.hear()
        return self.raylets

    def stop(self):
        self.process.stdin.close()
        self.process.wait(300)
        self.process.stdout.close()
        shutil.rmtree(self.environment["RAY_TMPDIR"], ignore_errors=True)
        self.log.close()


def main():
    from ray.cluster_utils import Cluster

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**HERE, "num_cpus": 0, "include_dashboard": False},
    )
    pid = cluster.head_node.all_processes["gcs_server"][0].process.pid
    print(json.dumps({"address": cluster.address, "gcs": pid}), file=out)
    nodes = []
    for line in sys.stdin:
        nodes = [node for node in nodes if is_alive(node)]
        while len(nodes) < int(line):
            nodes.append(cluster.add_node(**HERE, num_cpus=int(sys.argv[1])))
        print(json.dumps([raylet_of(node).pid for node in nodes]), file=out)
    cluster.shutdown()


def raylet_of(node):
    return node.all_processes["raylet"][0].process


def is_alive(node):
    return raylet_of(node).poll() is None


if __name__ == "__main__":
    main()
