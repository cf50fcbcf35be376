"""Sessions that outlive a request, a client and a server, over real stages and real stores."""

import os
import shutil
import signal
import sqlite3
import threading
import time

import httpx
import pytest

from pipeline.agreement.manifest import load_manifest
from pipeline.cli import pipeline_orch
from pipeline.cli.kept_sessions import session_book
from pipeline.kernels.kernel_selection import why_not_native
from tests.e2e.conftest import Ports
from tests.e2e.processes import stopped
from tests.e2e.test_relay import relaying
from tests.pipeline.sessions.redis_server import RedisServer

TEXT = "".join(f"Line {index} of a chat that goes on tomorrow. " for index in range(6))
FURTHER = TEXT + "And what then?"

native = pytest.mark.skipif(why_not_native() is not None, reason="native kernels are exact")


class Turns:
    """Servers, one after another, of one secret and one store."""

    def __init__(self, cluster, url, *extra):
        cluster.plan(2)
        self.cluster, self.secret = cluster, cluster.directory / "secret"
        self._flags = ["--supervise", "--context", "1024", "--prefix-share", "0", *extra]
        self._flags += ["--kv-store", url, "--secret-file", self.secret]

    def serve(self):
        self.server = self.cluster.serve(*self._flags)

    def restart(self):
        self.server.stop()
        self.serve()

    def turn(self, prompt, session="chat", max_tokens=8):
        """A text, and how many tokens of its prompt were there."""
        more = {} if session is None else {"session": session}
        answer = self.server.post(self.server.wish(prompt, max_tokens, **more)).json()
        details = answer["usage"]["prompt_tokens_details"]
        return answer["choices"][0]["text"], details["cached_tokens"]

    def goes_on(self, session="chat"):
        """Whether the second turn of a chat says what a cold run says; with how many loaded."""
        found, num_loaded = self.turn(FURTHER, session)
        assert found == self.turn(FURTHER, None)[0]
        return num_loaded


@pytest.fixture
def filed(cluster, tmp_path):
    """Turns on a store of files."""
    turns = Turns(cluster, f"file:{tmp_path / 'store'}")
    turns.serve()
    return turns


@pytest.fixture
def redis(tmp_path):
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def in_background(action, *arguments, **more):
    """A thread that does it, and where its result comes."""
    found = []
    thread = threading.Thread(target=lambda: found.append(action(*arguments, **more)))
    thread.start()
    return thread, found


@native
def test_after_a_restart_a_chat_goes_on_from_what_was_stored_for_one_client_at_a_time(filed):
    filed.turn(TEXT)
    filed.restart()
    assert filed.goes_on() >= len(TEXT)
    server, cluster = filed.server, filed.cluster
    book = session_book(filed.secret, load_manifest(cluster.manifest))
    # Who goes on before that is stored waits for it, and a stage that is stopped stores nothing.
    server.wait_for(lambda: next(book.records()).num_stored >= len(FURTHER))
    with stopped(server.workers()[1]):
        thread, found = in_background(filed.turn, TEXT, max_tokens=8)
        server.wait_for(server.num_taken)
        body = server.wish(TEXT, 5, session="chat")
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "session_in_use")
    thread.join(300)
    assert len(found) == 1
    names = cluster.orch_command(
        "session", "list", "--manifest", cluster.manifest, "--secret-file", filed.secret
    )
    assert names.stdout.startswith("chat\t")


@pytest.mark.slow
def test_a_session_in_use_or_unknown_is_one_clear_error(cluster, command, tmp_path):
    cluster.plan(2)
    secret = tmp_path / "secret"
    shared = ("--manifest", cluster.manifest, "--secret-file", secret)
    code, line = command(pipeline_orch, "session", "list", *shared)
    assert (code, secret.exists()) == (2, False)
    assert str(secret) in line
    directory = tmp_path / "secret.sessions"
    secret.write_bytes(bytes(32))
    secret.chmod(0o600)
    book = session_book(secret, load_manifest(cluster.manifest))
    session = book.open("", "chat")
    book.write(session.session_id, session.record)
    with session.locked():
        arguments = cluster.arguments("Hello", "--session", "chat", "--secret-file", secret)
        assert command(pipeline_orch, *arguments)[0] == 2
        code, line = command(pipeline_orch, "session", "forget", "chat", *shared)
        assert (code, "is in use" in line) == (2, True)
    for name in ("../secret", "../../etc/passwd", "", "chat/"):
        code, line = command(pipeline_orch, "session", "forget", name, *shared)
        assert (code, "there is no session" in line) == (2, True)
    secret.write_bytes(bytes(31) + b"x")
    code, line = command(pipeline_orch, "session", "list", *shared)
    (record,) = directory.glob("*.session")
    assert (code, str(record) in line, "another secret" in line) == (1, True, True)


def test_a_secret_is_refused_where_its_sessions_could_not_be_kept(cluster, command, tmp_path):
    cluster.plan(2)
    code, line = command(
        pipeline_orch, "serve", "--manifest", cluster.manifest, "--model-dir", cluster.model_dir,
        "--dev", "--window", "64", "--secret-file", tmp_path / "secret",
    )  # fmt: skip
    assert (code, "--window" in line) == (2, True)


@pytest.mark.slow
def test_a_command_goes_on_where_the_last_one_ended(cluster, tmp_path):
    cluster.plan(2)
    for idx in range(2):
        cluster.start_worker(idx, "--kv-store", f"file:{tmp_path / 'store'}")
    kept = ("--session", "chat", "--secret-file", tmp_path / "secret")
    length = ("--max-tokens", "8", "--ignore-eos")
    first = cluster.orch("One two three. ", *kept, *length)
    assert first.returncode == 0, first.stderr
    second = cluster.orch("Four five.", *kept, *length)
    assert second.returncode == 0, second.stderr
    listed = cluster.orch_command(
        "session", "list", "--manifest", cluster.manifest, "--secret-file", tmp_path / "secret"
    )
    name, num_tokens, num_stored = listed.stdout.split()
    assert (name, int(num_tokens)) == ("chat", 15 + 8 + 10 + 8)
    if why_not_native() is None:
        assert int(num_stored) == int(num_tokens) - 1


@native
@pytest.mark.slow
@pytest.mark.parametrize("victim", range(2))
def test_a_stage_killed_while_a_session_goes_on_changes_no_text(filed, victim):
    filed.turn(TEXT)
    filed.restart()
    expected, _ = filed.turn(FURTHER, None, max_tokens=400)
    server = filed.server
    begun = server.pipeline()["engine"]["num_tokens"]
    thread, found = in_background(filed.turn, FURTHER, max_tokens=400)
    server.wait_for(lambda: server.pipeline()["engine"]["num_tokens"] - begun > 20)
    os.kill(server.workers()[victim], signal.SIGKILL)
    thread.join(60)
    assert found[0][0] == expected
    assert "failover_complete" in server.log()


@native
@pytest.mark.slow
def test_a_store_that_was_emptied_rolled_back_or_swapped_is_not_believed(filed, tmp_path):
    store = tmp_path / "store"
    filed.turn(TEXT)
    filed.server.stop()
    older = tmp_path / "older"
    shutil.copytree(store, older)
    filed.serve()
    filed.turn(FURTHER + "More.", max_tokens=20)
    filed.turn(TEXT[::-1], "other")
    for change in ("rolled back", "emptied", "swapped"):
        filed.server.stop()
        if change == "swapped":
            swap_sessions(store)
        else:
            shutil.rmtree(store)
            if change == "rolled back":
                shutil.copytree(older, store)
        filed.serve()
        assert filed.goes_on() == 0, change
        assert "session_load_failed" in filed.server.log()
        assert filed.goes_on() > 0, change  # it is stored again
        filed.turn(TEXT[::-1], "other")


def swap_sessions(directory):
    """Give each session of each stage what another has."""
    database = sqlite3.connect(directory / "sessions.sqlite3", isolation_level=None)
    names = [name for (name,) in database.execute("SELECT name FROM sessions ORDER BY name")]
    others = dict(zip(names, names[1:] + names[:1], strict=True))
    tables = {table: database.execute(f"SELECT * FROM {table}").fetchall()
              for table in ("sessions", "blobs")}  # fmt: skip
    assert len(names) == 4
    assert tables["blobs"]
    database.execute("DELETE FROM sessions")
    database.execute("DELETE FROM blobs")
    for table, rows in tables.items():
        for name, *row in rows:
            places = ", ".join("?" for _ in (name, *row))
            database.execute(f"INSERT INTO {table} VALUES ({places})", (others[name], *row))
    database.close()


@native
@pytest.mark.slow
def test_a_redis_behind_a_relay_that_hangs_dies_or_is_flushed_costs_time_and_no_more(
    cluster, redis
):
    ports = Ports(1)
    cluster._ports.append(ports)
    port = ports.base
    with relaying(cluster, f"127.0.0.1:{port}=unix:{redis.socket}"):
        turns = Turns(cluster, f"redis://127.0.0.1:{port}/0")
        turns.serve()
        turns.turn(TEXT)
        turns.restart()
        assert turns.goes_on() >= len(TEXT)
        # A stage dies while it waits for what it is to load.
        os.kill(redis.process.pid, signal.SIGSTOP)
        thread, found = in_background(turns.turn, FURTHER)
        turns.server.wait_for(turns.server.num_running)
        time.sleep(0.5)
        os.kill(turns.server.workers()[0], signal.SIGKILL)
        os.kill(redis.process.pid, signal.SIGCONT)
        thread.join(60)
        assert "failover_complete" in turns.server.log()
        assert found[0][0] == turns.turn(FURTHER, None)[0]
        # It dies in mid-session, and later is there again, with nothing.
        thread, found = in_background(turns.turn, FURTHER, max_tokens=300)
        turns.server.wait_for(turns.server.num_running)
        redis.stop()
        thread.join(60)
        assert found[0][0] == turns.turn(FURTHER, None, max_tokens=300)[0]
        turns.server.wait_for_log("session_save_failed", 1)
        redis.start()
        assert redis.ask("FLUSHALL").startswith(b"+OK")
        assert turns.goes_on() == 0
        assert turns.goes_on() > 0
        assert redis.ask("FLUSHALL").startswith(b"+OK")
        assert turns.goes_on() == 0
        assert "session_load_failed" in turns.server.log()
