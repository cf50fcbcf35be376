"""Several texts at once, to be disturbed: each has to be what it is without."""

import os
import signal
import threading
from contextlib import contextmanager

from tests.e2e.processes import stopped

NUM_TOKENS = 250
REQUESTS = [
    {"prompt": f"Request number {index} says hello", "temperature": 0.9 if index % 2 else 0,
     "seed": index}
    for index in range(4)
]  # fmt: skip
# What each request gets, from any number of stages: the first server asked tells.
_UNDISTURBED = []


@contextmanager
def completing(server, pid, requests=REQUESTS):
    """All requests are under way in the body; yields their texts, complete after it.

    There no step moves: the process of a stage, or of a link, is stopped until it is killed or
    sent on its way.
    """
    for _ in range(20):  # on a busy machine they may be over before anybody has looked
        texts, threads = begin(server, requests)
        with stopped(pid):
            if is_disturbed := server.num_running() == len(requests):
                yield texts
        join(threads)
        if is_disturbed:
            return
    raise AssertionError("they were over too soon to be disturbed")


def begin(server, requests=REQUESTS):
    """Texts to come, under way unless one is there already, and the threads that ask for them."""
    texts = [None] * len(requests)

    def run(index):
        texts[index] = answer(server, requests[index])

    began = server.pipeline()["engine"]["num_tokens"]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: are_under_way(server, began, len(requests)) or any(texts))
    return texts, threads


def join(threads):
    for thread in threads:
        thread.join(300)


def expect_the_same_whoever_dies(server, expected, number=signal.SIGKILL, by_hand=None):
    """Each of three stages in turn, in the middle of texts that are `expected`.

    They are supervised, or of the cluster `by_hand`, where each is started again here.
    """
    for count, victim in enumerate(range(3), start=1):
        pid = server.workers()[victim] if by_hand is None else by_hand.workers[victim].pid
        with completing(server, pid) as texts:
            os.kill(pid, number)
            if by_hand is not None:
                by_hand.start_worker(victim)
            server.wait_for_log("event=failover_complete", count)
        assert texts == expected


def are_under_way(server, began, num_requests):
    """Whether all requests run, and have some of their tokens."""
    engine = server.pipeline()["engine"]
    num_tokens = engine["num_tokens"] - began
    return engine["num_running"] == num_requests and num_tokens > 5 * num_requests


def complete(server, index):
    return answer(server, REQUESTS[index])


def answer(server, request):
    return server.text(max_tokens=NUM_TOKENS, **request)


def alone(server, requests):
    """What each of them gets when nothing else is asked."""
    return [answer(server, request) for request in requests]


def undisturbed(server):
    """What the requests get when nothing happens."""
    if not _UNDISTURBED:
        _UNDISTURBED.extend(alone(server, REQUESTS))
    complete(server, 0)  # what a first request sets up is there
    return _UNDISTURBED
