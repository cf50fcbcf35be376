"""Stages that are away for long, leave in order, or cannot be reached: the server serves again."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

import pipeline.cli

MANUAL = Path(pipeline.cli.__file__).parent / "OPERATIONS.md"
NUM_TOKENS = 250
PROMPTS = [f"Request number {index} says hello" for index in range(8)]
RETURN_SECONDS = 10


@pytest.fixture
def serve(cluster):
    """Starts two stages by hand and a server in front of them."""

    def start(*extra):
        cluster.plan(2)
        for idx in range(2):
            cluster.start_worker(idx)
        return cluster.serve("--context", "512", *extra)

    return start


class Clients:
    """Eight clients that ask again and again; every text is the one of before."""

    def __init__(self, server):
        self._server = server
        self._expected = [server.text(prompt, NUM_TOKENS) for prompt in PROMPTS]
        self._is_over = threading.Event()
        self.longest_seconds = 0.0
        self.num_texts = self.num_refused = 0

    def __enter__(self):
        self._pool = ThreadPoolExecutor(len(PROMPTS))
        self._runs = [self._pool.submit(self._run, index) for index in range(len(PROMPTS))]
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for run in self._runs:
            run.result()
        self._pool.shutdown()

    def _run(self, index):
        url, body = f"{self._server.url}/v1/completions", self._server.wish(PROMPTS[index], 250)
        while not self._is_over.is_set():
            began = time.monotonic()
            answer = httpx.post(url, json=body, timeout=300)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            if answer.status_code == 503:
                self.num_refused += 1
                time.sleep(0.2)
                continue
            assert answer.json()["choices"][0]["text"] == self._expected[index]
            self.num_texts += 1


def documented_steps():
    """What the manual says to do with a stage, one after the other."""
    _, _, page = MANUAL.read_text().partition("## Updating a pipeline while it serves")
    return [
        " ".join(step.split()) for step in re.findall(r"^\d\. (.+(?:\n   .+)*)", page, re.MULTILINE)
    ]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_stages_updated_as_the_manual_says_cost_no_request_its_text(serve, cluster, number):
    server = serve()

    def stop(idx):
        server.wait_for(lambda: server.num_running() == len(PROMPTS))
        cluster.workers[idx].send_signal(number)
        server.wait_for(lambda: server.get("/readyz").status_code == 503)

    does = {
        "systemctl stop veilpipe-stage@": stop,
        "systemctl start veilpipe-stage@": cluster.start_worker,
        "Wait until `/readyz` is 200": lambda idx: server.wait_for(server.is_ready),
    }
    *steps, again = documented_steps()
    assert again == "The next stage."
    actions = [action for step in steps for words, action in does.items() if words in step]
    assert len(actions) == len(steps)
    with Clients(server) as clients:
        for idx in range(2):
            for action in actions:
                action(idx)
    assert clients.num_texts >= len(PROMPTS)
    assert clients.num_refused == 0


@pytest.mark.slow
def test_supervised_workers_told_to_stop_are_replaced_and_texts_go_on(cluster):
    cluster.plan(2)
    server = cluster.serve("--context", "512", "--supervise")
    with Clients(server) as clients:
        for idx in range(2):
            server.wait_for(lambda: server.num_running() == len(PROMPTS))
            os.kill(server.workers()[idx], signal.SIGTERM)
            server.wait_for_log("event=failover_complete", idx + 1)
    assert clients.num_refused == 0


@pytest.mark.slow
@pytest.mark.parametrize("is_idle", [True, False])
def test_a_stage_away_for_long_is_served_within_seconds_of_its_return(serve, cluster, is_idle):
    server = serve("--connect-timeout", "10")
    clients = Clients(server)
    if not is_idle:
        clients.__enter__()
    cluster.workers[1].kill()
    began = time.monotonic()
    server.wait_for(lambda: server.get("/health").json()["status"] == "away")
    while time.monotonic() - began < 90:
        assert server.get("/readyz").status_code == 503
        time.sleep(1)
    cluster.start_worker(1)
    cluster.wait_for_log(1, "event=listening", 2)
    server.wait_for(server.is_ready, RETURN_SECONDS)
    if not is_idle:
        clients.__exit__()
        assert clients.num_refused > 0
        assert clients.num_texts > 0


@pytest.fixture
def far_stage(cluster):
    """A network namespace for stage 1, and what starts commands in it; needs root."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    name = f"veilpipe{os.getpid()}"

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
        ip("link", "add", f"vp{os.getpid()}", "type", "veth", "peer", "name", "eth0", "netns", name)
    except subprocess.CalledProcessError:
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)
        pytest.skip("this system makes no network namespaces")
    link = f"vp{os.getpid()}"
    ip("addr", "add", "10.213.7.1/24", "dev", link)
    ip("link", "set", link, "up")
    for words in (("addr", "add", "10.213.7.2/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
                  ("link", "set", "lo", "up")):  # fmt: skip
        ip("-n", name, *words)
    yield name, ip
    ip("netns", "del", name)
    with suppress(subprocess.CalledProcessError):
        ip("route", "del", "blackhole", "10.213.7.2/32")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [8, 25, 90])
def test_a_stage_that_nothing_reaches_for_a_while_is_served_again(cluster, far_stage, seconds):
    name, ip = far_stage
    cluster.plan(2, hosts=("10.213.7.1", "10.213.7.2", "10.213.7.1"))
    cluster.start_worker(0)
    cluster.start_worker(1, within=("ip", "netns", "exec", name))
    server = cluster.serve("--context", "512", "--connect-timeout", "5")
    with Clients(server) as clients:
        server.wait_for(lambda: server.num_running() == len(PROMPTS))
        ip("-n", name, "link", "set", "eth0", "down")
        ip("route", "add", "blackhole", "10.213.7.2/32")  # else packets leave by the default one
        time.sleep(seconds)
        ip("route", "del", "blackhole", "10.213.7.2/32")
        ip("-n", name, "link", "set", "eth0", "up")
        before = clients.num_texts
        server.wait_for(server.is_ready, RETURN_SECONDS)
        server.wait_for(lambda: clients.num_texts > before + len(PROMPTS))
    # Until a stage is taken for lost its requests wait; what was cut for less costs none.
    assert (clients.num_refused > 0) is (seconds > 60)


@pytest.mark.slow
def test_ten_losses_in_ten_minutes_change_no_text_hang_nothing_and_keep_no_memory(serve, cluster):
    server = serve("--connect-timeout", "20", "--hang-timeout", "10")
    rng = random.Random(7)
    with Clients(server) as clients:
        sizes, began = [], time.monotonic()
        for minute in range(1, 11):
            idx = rng.randrange(2)
            cluster.workers[idx].send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            time.sleep(rng.choice([0.0, 1.0, 5.0, 30.0]))
            cluster.start_worker(idx)
            server.wait_for(server.is_ready, 30)
            time.sleep(max(began + 60 * minute - time.monotonic(), 1))
            sizes.append(resident_bytes(server.process.pid))
    assert clients.num_texts > len(PROMPTS)
    assert clients.longest_seconds < 20 + RETURN_SECONDS + 30
    assert max(sizes[5:]) < max(sizes[:5]) + (16 << 20)


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
