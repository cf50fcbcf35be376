"""Clients that go on asking while something happens to a server."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.test_many_losses import pieces


class Clients:
    """Each asks for its text again and again."""

    def __init__(self, server, num_clients):
        self._server = server
        self._pieces = threading.Semaphore(0)
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(num_clients)
        self._runs = [self._pool.submit(self._run, index) for index in range(num_clients)]

    def wait_for(self, num_pieces):
        """Return once there are so many more, of all texts together."""
        for _ in range(num_pieces):
            assert self._pieces.acquire(timeout=120)

    def ended(self):
        """Once all have their whole text: each one's texts, and the longest that any waited."""
        self._is_over.set()
        with self._pool:
            found = [run.result(300) for run in self._runs]
        return [texts for texts, _ in found], max(silence for _, silence in found)

    def _run(self, index):
        texts, times = set(), []
        while not (texts and self._is_over.is_set()):
            text = ""
            for piece in pieces(self._server, index):
                text += piece
                times.append(time.monotonic())
                self._pieces.release()
            texts.add(text)
        return texts, max(after - before for before, after in itertools.pairwise(times))
