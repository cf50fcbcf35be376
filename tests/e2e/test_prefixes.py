"""Turns of a chat over real stages: each goes on from what the one before has left there."""

import os
import signal
import threading

import pytest

TEXT = "".join(f"Line {index} of a text that everybody reads first. " for index in range(8))


@pytest.fixture
def serve(cluster):
    """Starts a server with three supervised workers."""
    cluster.plan(3)
    return lambda *extra: cluster.serve("--supervise", "--context", "1024", *extra)


@pytest.fixture
def serve_by_hand(cluster):
    """Starts a server in front of three workers."""
    cluster.plan(3)
    for idx in range(3):
        cluster.start_worker(idx)
    return lambda *extra: cluster.serve("--context", "1024", *extra)


def completed(server, prompt, max_tokens, **more):
    """A text, and how many tokens of its prompt were there."""
    answer = server.post(server.wish(prompt, max_tokens, **more)).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def holds_nothing(server):
    """Whether every stage has told that it holds no tokens."""
    figures = [stage["figures"] for stage in server.pipeline()["stages"]]
    return all(each is not None and each["kv_tokens"] == 0 for each in figures)


def is_exact(server):
    return all(stage["kernels"] == "native" for stage in server.pipeline()["stages"])


def test_what_is_kept_is_used_by_its_owner_alone_counted_and_cleared_in_time(serve_by_hand):
    server = serve_by_hand("--prefix-ttl", "600")
    if not is_exact(server):
        pytest.skip("nothing is kept where rows are not exact")
    cold, cached = completed(server, TEXT, 8, cache_salt="other")
    assert cached == 0
    assert completed(server, TEXT, 8) == (cold, 0)
    assert completed(server, TEXT, 8) == (cold, len(TEXT) - 1)
    more, cached = completed(server, TEXT + cold, 8)
    assert cached >= len(TEXT)
    metrics = server.get("/metrics").text.splitlines()
    assert "veilpipe_idle_prefixes 2.0" in metrics
    assert "veilpipe_prefix_hits_total 2.0" in metrics
    engine = server.pipeline()["engine"]
    assert engine["num_cached_tokens"] == len(TEXT) - 1 + cached
    server.stop()
    server = serve_by_hand("--prefix-ttl", "0.5")
    assert completed(server, TEXT + cold, 8) == (more, 0)
    server.wait_for(lambda: server.pipeline()["engine"]["num_idle_prefixes"] == 0)
    server.wait_for(lambda: holds_nothing(server))
    assert completed(server, TEXT + cold, 8) == (more, 0)


@pytest.mark.slow
def test_with_a_share_of_nothing_nothing_is_kept(serve):
    server = serve("--prefix-share", "0")
    server.wait_for(lambda: server.pipeline()["stages"][-1]["figures"])
    assert completed(server, TEXT, 8) == completed(server, TEXT, 8)
    server.wait_for(lambda: holds_nothing(server))


@pytest.mark.slow
@pytest.mark.parametrize("victim", range(3))
def test_a_stage_killed_under_requests_on_reused_prefixes_changes_no_text(serve, victim):
    server = serve()
    if not is_exact(server):
        pytest.skip("nothing is kept where rows are not exact")
    prompts = [TEXT + "And on.", TEXT + "Or not.", TEXT[:200] + "Else."]
    expected = [completed(server, prompt, 250, cache_salt=prompt)[0] for prompt in prompts]
    completed(server, TEXT, 8)
    found = {}

    def ask(index):
        found[index] = completed(server, prompts[index], 250)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    begun = server.pipeline()["engine"]["num_tokens"]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: server.pipeline()["engine"]["num_tokens"] - begun > 60)
    assert not found, "they were over too soon to be disturbed"
    os.kill(server.workers()[victim], signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    server.wait_for_log("failover_complete", 1)
    assert [found[index][0] for index in range(len(prompts))] == expected
    assert all(found[index][1] >= 200 for index in range(len(prompts)))
