"""Joining, pushing and generating by commands, with machines in a thread of this process."""

import re
import socket
import sys
import threading
from functools import partial

import pytest
import trio

from pipeline.agreement.manifest import load_manifest
from pipeline.cli import cluster_plan, join, pipeline_orch
from pipeline.engine.tokenizer import Tokenizer
from pipeline.machines import visits
from pipeline.machines.measure import measure
from tests.pipeline.machines.conftest import SOFTWARE, Rig
from tests.pipeline.machines.test_machine import reference

PROMPT = "Hello there"


class Machines:
    """Machines that run in a thread until this is closed."""

    def __init__(self, directory, names):
        self.rig = Rig(directory)
        self.found = {}
        self._names = names
        self._scopes = {}
        self._held = []
        self._ended = {name: threading.Event() for name in names}
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,))

    async def _run(self):
        async def yes(_):
            return True

        self._over = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

        async def run(name, task_status):
            with trio.CancelScope() as self._scopes[name]:
                async with self.rig.machine(name, offers=yes, knows_home=False) as machine:
                    self.found[name] = machine
                    task_status.started()
                    await self._over.wait()
            self._ended[name].set()

        async with trio.open_nursery() as nursery:
            for name in self._names:
                await nursery.start(run, name)
            self._is_up.set()
            await self._over.wait()

    def __enter__(self):
        self._thread.start()
        assert self._is_up.wait(300)
        return self

    def __exit__(self, *_):
        self._token.run_sync_soon(self._over.set)
        self._thread.join()
        for sock in self._held:
            sock.close()

    def stop(self, name):
        """Return when that machine is gone; what dials it is refused, for nobody gets its ports."""
        machine = self.found[name]
        held = [listener._sock.dup() for listener in (machine.control, machine.data_in)]
        self._token.run_sync_soon(self._scopes[name].cancel)
        assert self._ended[name].wait(300)
        for sock in held:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            sock.shutdown(socket.SHUT_RDWR)
        self._held += held

    def line(self, name):
        return str(self.found[name].line)

    def at(self, name):
        return self.found[name].address.host_port


@pytest.fixture
def home(monkeypatch, capfd, tmp_path, tiny_model):
    """Runs commands at home: exit code, stdout, stderr's lines."""
    monkeypatch.setenv("VEILPIPE_STATE_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(join, "software_version", lambda: SOFTWARE)
    monkeypatch.setattr(cluster_plan, "software_version", lambda: SOFTWARE)
    monkeypatch.setattr(visits, "measure", partial(measure, seconds=0.05))
    manifest = tmp_path / "cluster.json"

    def run(*words):
        if words[0] == "join":
            words = (*words, "--model-dir", tiny_model, "-o", manifest)
        else:
            words = (*words, "--manifest", manifest)
        monkeypatch.setattr(sys, "argv", ["pipeline-orch", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        out, err = capfd.readouterr()
        return caught.value.code, out, err.splitlines()

    run.manifest = manifest
    return run


def errors(lines):
    return [line for line in lines if "error:" in line]


def test_from_lines_to_text_and_to_another_split(home, tmp_path, tiny_model, monkeypatch):
    tokenizer = Tokenizer(tiny_model / "tokenizer.json")
    prompt_ids = tokenizer.encode(PROMPT)
    expected = tokenizer.decode([*prompt_ids, *reference(tiny_model, prompt_ids)]) + "\n"
    text = ("--text", PROMPT, "--max-tokens", 12, "--ignore-eos")
    with Machines(tmp_path, ("a", "b", "c")) as machines:
        code, out, err = home("join", machines.line("a"), machines.line("b"), "--push")
        assert code == 0, err[-3:]
        heads, *rows = out.splitlines()
        assert heads.split()[:3] == ["stage", "machine", "layers"]
        assert {row.split()[1] for row in rows} == {machines.at("a"), machines.at("b")}
        assert home(*text)[:2] == (0, expected)
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("VEILPIPE_STATE_DIR", str(tmp_path / "elsewhere"))
            code, _, err = home(*text)
            assert code == 2
            assert "this home has joined no machines" in err[-1]
        before = load_manifest(home.manifest)
        assert all(stage.kernels and stage.precision == "float32" for stage in before.stages)

        # Used lines are refused, and change nothing.
        code, _, err = home("join", machines.line("a"))
        assert code == 1
        (error,) = errors(err)
        assert "has been used already, by SHA256:" in error
        assert "that is this home: leave the line out" in error
        assert load_manifest(home.manifest) == before

        code, out, err = home("join", machines.line("c"), "--remove", machines.at("a"), "--push")
        assert code == 0, err[-3:]
        assert {row.split()[1] for row in out.splitlines()[1:]} == {
            machines.at("b"), machines.at("c"),
        }  # fmt: skip
        assert machines.found["a"].served is None
        assert home(*text)[:2] == (0, expected)

        code, out, _ = home("parts")
        assert code == 0
        assert out.count(" used") == 6
        code, out, _ = home("parts", "--remove-unused")
        assert " unused" not in out
        code, _, err = home("parts", "--remove", "f" * 64)
        assert code == 2
        assert "no part's hash begins with that" in err[-1]

    code, _, err = home("push")
    assert code == 1
    (error,) = errors(err)
    assert "cannot dial" in error
    assert "NAT" in error


def test_a_disk_without_room_for_the_part_is_named_with_what_it_needs_and_has(home, tmp_path):
    with Machines(tmp_path, ("a",)) as machines:
        store = machines.found["a"].store
        store._quota_bytes = 1000
        code, out, err = home("join", machines.line("a"))
        assert (code, out) == (2, "")
        (error,) = errors(err)
        assert re.search(rf"{machines.at('a')} needs \d+\.\d MB and has 0\.0 MB free", error)
        assert not home.manifest.exists()
        store._quota_bytes = 1 << 30
        code, out, err = home("join", "--push")
        assert code == 0, err[-3:]
        assert " 1.0 GiB " in out.splitlines()[1]
        # The very part that lies there needs no room.
        store._quota_bytes = sum(part.num_bytes for part in store.parts())
        code, _, err = home("join", "--push")
        assert code == 0, err[-3:]


def test_a_machine_whose_line_was_used_before_something_failed_is_counted_in_next(
    home, tmp_path, monkeypatch
):
    with Machines(tmp_path, ("a", "b")) as machines:
        with monkeypatch.context() as older:
            older.setattr(cluster_plan, "software_version", lambda: "1.0")
            code, _, err = home("join", machines.line("a"))
            assert code == 2
            assert "install the same version" in errors(err)[0]
        assert not home.manifest.exists()
        code, out, err = home("join", machines.line("b"))
        assert code == 0, err[-3:]
        assert {row.split()[1] for row in out.splitlines()[1:]} == {
            machines.at("a"), machines.at("b"),
        }  # fmt: skip
        assert not home.manifest.with_suffix(".joined").exists()
        home.manifest.unlink()
        home.manifest.with_suffix(".joined").write_text("no machine at all\n")
        code, _, err = home("join")
        assert code == 2
        assert "is no list of machines" in errors(err)[0]
