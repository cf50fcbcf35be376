"""What happens where a machine of one's own stays lost: all waits, or goes on over the rest."""

import json

import pytest
import trio

from pipeline.agreement.manifest import load_manifest
from pipeline.cli.pipeline_access import PipelineAccess
from pipeline.errors import InputError, SessionError, SessionRefused, StageMismatch
from tests.pipeline.cli.test_join import (  # noqa: F401 - the fixture
    PROMPT,
    Machines,
    errors,
    home,
)

TEXT = ("--text", PROMPT, "--max-tokens", 12, "--ignore-eos", "--connect-timeout", 1)


def test_a_text_goes_on_over_the_machines_that_are_left(home, tmp_path, tiny_model):  # noqa: F811
    with Machines(tmp_path, ("a", "b")) as machines:
        assert home("join", *map(machines.line, "ab"), "--push")[0] == 0
        expected = home(*TEXT)
        assert expected[0] == 0, expected[2][-3:]
        before = load_manifest(home.manifest)
        machines.stop("b")
        code, _, err = home(*TEXT)
        assert code == 1
        assert "gave up after 1 s" in errors(err)[0]

        replan = ("--replan", "--model-dir", tiny_model)
        replan = (*replan, "--tokenizer", tiny_model / "tokenizer.json")
        code, out, err = home(*TEXT, *replan)
        assert (code, out) == expected[:2], err[-3:]
        assert load_manifest(home.manifest) == before
        found = load_manifest(home.manifest.with_name("cluster.replanned.json"))
        assert [stage.endpoint.control.addr for stage in found.stages] == [machines.at("a")]

        machines.stop("a")
        code, _, err = home(*TEXT, *replan)
        assert code == 1
        assert "none of the machines answers" in errors(err)[0]


def test_what_cannot_be_replanned_is_said_at_once(home, tmp_path, tiny_model):  # noqa: F811
    with Machines(tmp_path, ("a",)) as machines:
        assert home("join", machines.line("a"))[0] == 0
        code, _, err = home(*TEXT, "--replan")
        assert code == 2
        assert "give --model-dir" in errors(err)[0]
        other = tmp_path / "other"
        other.mkdir()
        config = json.loads((tiny_model / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config, indent=7))
        words = ("--model-dir", other, "--tokenizer", tiny_model / "tokenizer.json")
        code, _, err = home(*TEXT, "--replan", *words)
        assert code == 2
        assert len(errors(err)) == 1
        words = ("--model-dir", tiny_model, "--tokenizer", tiny_model / "tokenizer.json")
        code, _, err = home(*TEXT, "--replan", "--supervise", *words)
        assert code == 2
        assert "machines that this home has joined" in errors(err)[0]


class Scripted(PipelineAccess):
    """Stages of which each try ends as the script says."""

    async def _run(self, work, source, watcher, *, outlasts):
        await trio.lowlevel.checkpoint()
        step = self.options.pop(0)
        if step == "stand":
            await work(None)
            step = self.options.pop(0)
        if step is not None:
            raise step


class Watcher:
    def __init__(self):
        self.told = []

    def away(self, error):
        self.told.append(str(error))


def access(script, *moves):
    """As the script says; each move is where it leads to, or what is in its way."""
    moves = list(moves)

    async def move():
        await trio.lowlevel.checkpoint()
        found = moves.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    return Scripted(None, None, list(script), None, is_resumable=True, move=move)


class Standing:
    ready = ()


async def work(_):
    await trio.lowlevel.checkpoint()


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr("pipeline.cli.pipeline_access._tell_kernels", lambda pipeline: None)
    monkeypatch.setattr(PipelineAccess, "_tell_memory", lambda access, pipeline: None)


LOST = SessionError("gave up after 30 s: stage 1 is not up")


async def test_what_is_lost_is_moved_and_what_is_lost_after_that_too():
    third = access([None])
    second = access(["stand", LOST], third)
    await access(["stand", LOST], second).run(work, None)
    assert third.options == []


@pytest.mark.parametrize("kind", [SessionRefused, StageMismatch])
async def test_what_is_set_up_wrongly_is_not_moved(kind):
    with pytest.raises(kind):
        await access([kind("stage 0 is another")], access([None])).run(
            work, None, Watcher(), outlasts=True
        )


async def test_what_a_stage_refuses_ends_a_single_text():
    with pytest.raises(SessionRefused):
        await access(["stand", SessionRefused("too large")], access([None])).run(work, None)


async def test_a_single_text_ends_where_nothing_is_left_to_move_to():
    with pytest.raises(InputError, match="smaller --dtype"):
        await access([LOST], InputError("choose a smaller --dtype")).run(work, None)


async def test_a_server_tells_its_clients_and_tries_both_ways_on_and_on(autojump_clock):
    watcher = Watcher()
    await access(["stand", LOST, LOST, None], SessionError("none answers"), LOST).run(
        work, None, watcher, outlasts=True
    )
    assert watcher.told == [f"{LOST}; none answers", f"{LOST}; {LOST}"]
