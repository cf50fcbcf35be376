"""What reaches stdout, and what happens when nobody reads it."""

import os
import pty
import signal
import subprocess

import pytest

READER_GONE = 128 + signal.SIGPIPE


@pytest.fixture
def unread(cluster):
    """Runs a command whose stdout nobody reads: (exit code, stderr)."""

    def run(name, *arguments, **options):
        reader, writer = os.pipe()
        os.close(reader)
        try:
            result = subprocess.run(
                [cluster.bin / name, *arguments], stdout=writer, stderr=subprocess.PIPE,
                text=True, env=cluster.environment, timeout=300, **options,
            )  # fmt: skip
        finally:
            os.close(writer)
        return result.returncode, result.stderr

    return run


@pytest.mark.parametrize(
    "command",
    [
        ("stage-worker", "--help"),
        ("pipeline-relay", "--help"),
        ("pipeline-orch", "--help"),
        ("pipeline-orch", "plan", "--help"),
        ("pipeline-orch", "top", "-h"),
        ("pipeline-orch", "attest", "--help"),
    ],
    ids=" ".join,
)
def test_help_that_nobody_reads_ends_quietly(unread, command):
    assert unread(*command) == (READER_GONE, "")


def test_a_manifest_and_a_key_that_nobody_reads_end_quietly(unread, cluster):
    plan = ("plan", "--model-dir", cluster.model_dir, "--stages", "2")
    assert unread("pipeline-orch", *plan) == (READER_GONE, "")
    assert unread("pipeline-orch", "keygen", cluster.directory / "key") == (READER_GONE, "")


def test_a_text_that_nobody_reads_ends_the_generation(unread, cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    cluster.wait_for_log(0, "event=listening")
    code, stderr = unread("pipeline-orch", *cluster.arguments("Hi", "--max-tokens", "50"))
    assert code == READER_GONE
    assert "error" not in stderr
    assert "Traceback" not in stderr
    result = cluster.orch("Hi", "--max-tokens", "3")  # and the worker serves on
    assert result.returncode == 0, result.stderr


def test_a_terminal_is_shown_text_and_a_pipe_given_bytes_and_the_prompt_may_come_on_stdin(cluster):
    cluster.plan(1)
    cluster.start_worker(0)
    arguments = [each for each in cluster.arguments("") if each not in ("--text", "")]
    command = [cluster.bin / "pipeline-orch", *arguments, "--text-file", "-", "--max-tokens", "4"]
    prompt = b"Hi\x1b]0;owned\x07\xc2\x9b2J\n"

    def run(stdout):
        return subprocess.run(
            command, input=prompt, stdout=stdout, stderr=subprocess.PIPE,
            env=cluster.environment, timeout=300, check=True,
        )  # fmt: skip

    assert run(subprocess.PIPE).stdout.startswith(prompt.removesuffix(b"\n"))
    leader, follower = pty.openpty()
    try:
        run(follower)
        shown = os.read(leader, 4096).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert shown.startswith(r"Hi\x1b]0;owned\x07\x9b2J")
    assert "\x1b" not in shown
