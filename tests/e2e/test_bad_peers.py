"""What is not veilpipe, or not the same veilpipe, is told apart in one line and harms nobody."""

import socket
import threading
from contextlib import contextmanager

import pytest

from pipeline.cli import pipeline_orch


def test_development_evidence_is_refused_where_it_is_not_allowed(command, cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    key = cluster.directory / "key.pem"
    assert cluster.orch_command("keygen", key).returncode == 0
    cluster.edit(lambda m: m["stages"][0].update(expected_measurements={"0": "ab" * 48}))
    cluster.wait_for_log(0, "event=listening")
    arguments = [each for each in cluster.arguments() if each != "--dev"]
    code, line = command(pipeline_orch, *arguments, "--identity", key)
    assert code == 1, line
    assert "stage 0" in line
    assert "DEV" in line


def test_manifests_that_differ_are_told_apart_before_the_prompt_leaves(command, cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    cluster.wait_for_log(0, "event=listening")
    cluster.edit(lambda m: m.update(model_version="2"))
    code, line = command(pipeline_orch, *cluster.arguments())
    assert code == 1, line
    assert "manifest" in line


@contextmanager
def impostor(port, behave):
    """Something that is not veilpipe where stage 0 should be."""
    held = []
    with socket.create_server(("127.0.0.1", port)) as server:

        def serve():
            try:
                while True:
                    sock, _ = server.accept()
                    held.append(sock)
                    behave(sock)
            except OSError:
                pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for sock in held:
                sock.close()


@pytest.mark.parametrize(
    ("behave", "word"),
    [
        (lambda sock: sock.close(), "closed"),
        (lambda sock: (sock.recv(10), sock.close()), "stage 0"),
        (lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100), "stage 0"),
        (lambda sock: sock.sendall(b"\xff" * 70_000), "stage 0"),
        (lambda sock: sock.sendall(b"\0" * 70_000), "stage 0"),
        (lambda sock: None, "silent"),
    ],
    ids=["closes", "closes-later", "http", "ones", "zeros", "silent"],
)
def test_a_peer_that_is_not_veilpipe(orch, cluster, behave, word):
    with impostor(cluster.base_port, behave):
        code, line = orch("Hi", "--connect-timeout", "2", "--handshake-timeout", "1")
    assert code == 1
    assert "stage 0" in line


def test_stages_that_never_come_up(orch, cluster):
    code, line = orch("Hi", "--connect-timeout", "0.5")
    assert code == 1
    assert "stage 0" in line
    assert f"127.0.0.1:{cluster.base_port}" in line


def test_a_worker_survives_strangers_and_still_serves(cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    cluster.wait_for_log(0, "event=listening")
    strangers = []
    for port in (cluster.base_port, cluster.base_port + 1):
        for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 70_000, b"\0\x20") * 3:
            sock = socket.create_connection(("127.0.0.1", port))
            try:
                sock.sendall(garbage)
            except OSError:
                pass  # the worker has hung up already
            strangers.append(sock)
    result = cluster.orch("Hi", "--max-tokens", "3")
    for sock in strangers:
        sock.close()
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in cluster.log(0)
