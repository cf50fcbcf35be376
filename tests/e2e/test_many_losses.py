"""Supervised stages die again and again: texts stay what they are, and none is silent for long."""

import itertools
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pipeline.placement.attempts import PROBATION_SECONDS

pytestmark = pytest.mark.slow

NUM_TOKENS = 250
NUM_KILLS = 10
SILENT_SECONDS = 20  # a tenth of it where nothing else computes


class Streams:
    """Texts that arrive side by side, piece by piece."""

    def __init__(self, server, num_requests):
        self._server = server
        self._pool = ThreadPoolExecutor(num_requests)
        self._has_begun = threading.Barrier(num_requests + 1)
        self._runs = [self._pool.submit(self._run, index) for index in range(num_requests)]

    def wait_for_all(self):
        """Return once each has some of its text."""
        self._has_begun.wait(120)

    def ended(self):
        """The texts, and the longest that one of them was silent."""
        with self._pool:
            found = [run.result(120) for run in self._runs]
        return [text for text, _ in found], max(silence for _, silence in found)

    def _run(self, index):
        text, times = "", []
        for piece in pieces(self._server, index):
            times.append(time.monotonic())
            text += piece
            if len(times) == 5:
                self._has_begun.wait(120)
        return text, max(after - before for before, after in itertools.pairwise(times))


def pieces(server, index):
    """A text as it arrives."""
    wish = server.wish(
        f"Request number {index} says hello", NUM_TOKENS, stream=True, seed=index,
        temperature=0.9 if index % 2 else 0,
    )  # fmt: skip
    with httpx.stream("POST", f"{server.url}/v1/completions", json=wish, timeout=300) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield "".join(each["text"] for each in json.loads(line[6:])["choices"])


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_ten_kills_change_no_text_and_keep_none_silent_for_long(cluster, precision, num_requests):
    cluster.plan(2)
    server = cluster.serve(
        "--context", "512", "--supervise", "--dtype", precision, "--max-batch", str(num_requests)
    )

    def texts(victim=None):
        streams = Streams(server, num_requests)
        streams.wait_for_all()
        if victim is not None:
            os.kill(server.workers()[victim], signal.SIGKILL)
        return streams.ended()

    def disturb(victim):
        before = server.workers()[victim]
        found, silence = texts(victim)
        assert found == expected
        assert silence < SILENT_SECONDS
        server.wait_for(lambda: server.workers()[victim] != before)
        server.wait_for(server.is_ready)

    expected, _ = texts()
    for victim in [0, 1] * (NUM_KILLS // 2):
        time.sleep(PROBATION_SECONDS)  # who dies again and again is replaced ever later
        disturb(victim)
