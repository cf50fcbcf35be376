"""`pipeline-orch --door`: an ordinary text by ordinary flags, and one line for every error."""

import json
import sys
from contextlib import asynccontextmanager

import pytest
import trio

from pipeline.agreement.manifest import dump_manifest
from pipeline.cli import pipeline_orch
from pipeline.doors import dial, home_record
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import InputError
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.store_url import open_store
from pipeline.stage.step_executor import StageCore
from tests.pipeline.doors.rig import LIMITS, Wire, generate, model
from transport.attestation.dev_authority import DevAttester, DevAuthority

__all__ = ["model"]


@pytest.fixture
def orch(model, tmp_path, monkeypatch, capfd):
    """Runs the command at a door in its own process, whose URL nobody dials."""
    monkeypatch.setenv("VEILPIPE_DEV_DIR", str(tmp_path / "dev"))
    authority = DevAuthority.load_or_create(tmp_path / "dev")
    manifest = tmp_path / "door.json"
    manifest.write_text(dump_manifest(model.manifest))
    made = []

    @asynccontextmanager
    async def connect(url, **options):
        store = open_store(f"file:{tmp_path}/store", StoreLimits())
        attester = DevAttester(authority, {})
        async with store as store, model.door(attester=attester, store=store) as door:
            wire = Wire(door)
            wire.max_body_bytes, wire.url, wire.options = 4096, url, options
            made.append(wire)
            yield wire
            wire.num_sessions = len(door._sessions)

    monkeypatch.setattr(dial, "connect", connect)

    def run(*words):
        line = [
            "pipeline-orch", "--manifest", manifest, "--tokenizer",
            model.directory / "tokenizer.json", "--text", "Hello there, door", "--max-tokens", "12",
            "--ignore-eos", *words,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(word) for word in line])
        with pytest.raises(SystemExit) as caught:
            pipeline_orch.main()
        out, err = capfd.readouterr()
        return caught.value.code, out, err.splitlines()

    run.made, run.directory = made, tmp_path
    return run


DOOR = ("--door", "grpcs://door.example:443", "--dev")


async def expected(model):
    tokenizer = Tokenizer(model.directory / "tokenizer.json")
    prompt = tokenizer.encode("Hello there, door")
    core = StageCore(model.whole(), LIMITS.for_session(model.codec))
    return await generate(LocalPipeline([core]), prompt=prompt)


def test_a_prompt_goes_through_a_door(orch, model):
    tokens = trio.run(expected, model)
    latency = orch.directory / "latency.json"
    code, out, err = orch(*DOOR, "--latency-out", latency)
    assert code == 0, err
    assert json.loads(latency.read_text())["token_ids"] == tokens
    assert out.startswith("Hello there, door")
    (wire,) = orch.made
    assert wire.url == DOOR[1]
    assert wire.options == {"is_dev": True, "ca_file": None, "bearer_key": None}
    assert max(len(each.cloaked_embedding) for each in wire.requests) <= 4096
    assert wire.num_sessions == 0  # nobody comes back to it


def test_a_named_session_is_its_owners_and_stays(orch):
    secret = orch.directory / "secret"
    own = ("--session", "chat", "--secret-file", secret)
    first, second = (orch(*DOOR, *own) for _ in range(2))
    assert first[0] == second[0] == 0
    assert first[1] == second[1]
    tokens = [sum(each.shape[0] for each in wire.requests) for wire in orch.made]
    assert tokens[1] < tokens[0] - 10  # the prompt's most part is stored
    names = {request.session_id for wire in orch.made for request in wire.requests}
    assert len(names) == 1
    assert orch.made[0].num_sessions == 1
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32
    (record,) = orch.directory.glob("secret.*")
    assert record.stat().st_mode & 0o777 == 0o600
    secret.unlink()
    assert orch(*DOOR, *own)[0] == 0
    assert orch.made[-1].requests[0].session_id not in names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*DOOR, "--session", "chat"), "--session needs --secret-file"),
        (("--dev", "--door-ca", "ca.pem"), "--door-ca is for layers behind a door"),
        ((*DOOR, "--supervise"), "--supervise is for stages of one's own"),
        ((*DOOR, "--kv-memory", "1"), "--kv-memory is for stages of one's own"),
        (("--door", "grpcs://door:443"), "has no expected_measurements"),
        ((*DOOR, "--door-key-file", "missing"), "cannot read the door's key from missing"),
        ((*DOOR, "--context", "5000"), "--context 5000 is more than the model's 4096"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_flags_are_one_line_and_exit_code_2(orch, words, message):
    code, out, err = orch(*words)
    assert (code, out) == (2, "")
    assert message in err[-1]
    assert not orch.made


def test_a_record_that_cannot_be_written_costs_no_text(orch, monkeypatch, caplog):
    def full(*_, **__):
        raise InputError("cannot write: no space left on device")

    monkeypatch.setattr(home_record, "write_atomically", full)
    code, out, _ = orch(*DOOR, "--session", "chat", "--secret-file", orch.directory / "secret")
    assert code == 0
    assert out.startswith("Hello there, door")
    assert "event=session_not_remembered" in caplog.text


def test_a_secret_that_is_none_is_refused(orch):
    secret = orch.directory / "secret"
    secret.write_bytes(b"short")
    for mode, message in ((0o600, "has 5 bytes; it needs at least 32"), (0o644, "open to other")):
        secret.chmod(mode)
        code, _, err = orch(*DOOR, "--session", "chat", "--secret-file", secret)
        assert code == 2
        assert message in err[-1]


@pytest.mark.parametrize("options", [PlanOptions(1), PlanOptions(2, split="client")], ids=str)
def test_a_manifest_that_no_door_serves_is_refused(orch, model, options):
    path = orch.directory / "door.json"
    path.write_text(dump_manifest(plan(model.directory, options)))
    code, _, err = orch(*DOOR)
    assert code == 2
    assert "--door: this manifest has" in err[-1]


def test_a_door_of_another_authority_is_refused_before_anything_is_sent(orch, monkeypatch):
    monkeypatch.setenv("VEILPIPE_DEV_DIR", str(orch.directory / "other"))
    code, out, err = orch(*DOOR)
    assert code == 1
    assert out == "Hello there, door"
    assert "the door's evidence is refused: root" in err[-1]
    assert not orch.made[0].requests


def test_a_context_beyond_the_doors_is_one_line(orch):
    code, _, err = orch(*DOOR, "--text", "x" * 140)
    assert code == 1
    assert "the door refuses: the step reaches position" in err[-1]
