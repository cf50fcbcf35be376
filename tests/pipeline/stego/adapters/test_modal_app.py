"""Offline: what is defined, and each call in this process by an engine that is a toy."""

import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import modal
import pytest
from modal.exception import AuthError, NotFoundError

from pipeline.stego.adapters import modal_app
from pipeline.stego.adapters.modal_app import DecodeBody, EncodeBody, Stego
from pipeline.stego.errors import StegoError
from tests.pipeline.stego.adapters.toys import ToyEngine

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.filterwarnings("ignore:The Stego:UserWarning")


class HTTPException(Exception):
    def __init__(self, status_code, detail):
        super().__init__(detail)
        self.status_code, self.detail = status_code, detail


@pytest.fixture
def loaded(monkeypatch):
    """The settings that the engine was asked for, one for each container."""
    loads = []

    def engine(settings, cache_dir):
        loads.append((settings, cache_dir))
        return ToyEngine()

    monkeypatch.setattr(modal_app, "TensorRtEngine", engine)
    monkeypatch.setenv("STEGO_SECRET", "11" * 32)
    fastapi = types.ModuleType("fastapi")
    fastapi.HTTPException = HTTPException
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    return loads


def test_a_message_goes_through_text_and_back_and_the_engine_is_loaded_once(loaded):
    stego = Stego(model="some/model")
    text = stego.encode.local("meet at nine", "Dear all")
    assert stego.decode.local(text, "Dear all") == b"meet at nine"
    ((settings, cache_dir),) = loaded
    assert settings.model == "some/model"
    assert not settings.is_fp8
    assert cache_dir == Path("/cache/engines")


def test_the_endpoints_do_the_same(loaded):
    stego = Stego()
    text = stego.encode_web.local(EncodeBody(message="at nine", prompt="Dear all"))["text"]
    answer = stego.decode_web.local(DecodeBody(text=text, prompt="Dear all"))
    assert answer == {"message": "at nine"}
    assert loaded[0][0].model == modal_app.MODEL


def test_what_cannot_be_done_is_the_callers_fault_over_http(loaded):
    stego = Stego()
    with pytest.raises(HTTPException, match="carries at most") as refused:
        stego.encode_web.local(EncodeBody(message="x" * 70_000, prompt="Dear all"))
    assert refused.value.status_code == 400
    with pytest.raises(HTTPException, match="no message can be read") as refused:
        stego.decode_web.local(DecodeBody(text="abc", prompt="Dear all"))
    assert refused.value.status_code == 400
    text = stego.encode.local(b"\xff\xfe", "Dear all")
    with pytest.raises(HTTPException, match="no text"):
        stego.decode_web.local(DecodeBody(text=text, prompt="Dear all"))


@pytest.mark.parametrize("secret", ["", "zz", "11" * 31])
def test_without_a_secret_nothing_is_loaded(loaded, monkeypatch, secret):
    monkeypatch.setenv("STEGO_SECRET", secret)
    with pytest.raises(StegoError):
        Stego().encode.local("x", "Dear all")
    assert not loaded


def test_the_app_is_defined_as_the_runbook_says():
    assert modal_app.app.name == "stego-trtllm"
    assert modal_app.VOLUME_NAME == "stego-trtllm-volume"
    runbook = (ROOT / "pipeline/stego/adapters/README.md").read_text()
    for name in (modal_app.APP_NAME, modal_app.VOLUME_NAME, "HF_TOKEN", "STEGO_SECRET"):
        assert name in runbook


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("stego_modal", ROOT / "scripts/stego_modal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Deployed:
    """What Modal hands out for a class that is deployed; calls go to this process."""

    def __init__(self, fault=None):
        self.fault = fault
        self.options = {}

    def hydrate(self):
        if self.fault is not None:
            raise self.fault

    def with_options(self, **options):
        self.options |= options
        return self

    def __call__(self, **parameters):
        self.options |= parameters
        local = Stego(**parameters)

        def remote(method):
            return SimpleNamespace(remote=method.local)

        return SimpleNamespace(encode=remote(local.encode), decode=remote(local.decode))


def run(script, monkeypatch, found, *flags):
    monkeypatch.setattr(modal.Cls, "from_name", lambda app, name: found)
    return script.main(["-m", "at nine", "-p", "Dear all", *flags])


def test_the_script_shows_a_round_trip(loaded, script, monkeypatch, capsys):
    assert run(script, monkeypatch, Deployed()) == 0
    short = capsys.readouterr()
    assert len(short.out) == script.NUM_SHOWN + 2
    assert "was read" in short.err
    assert run(script, monkeypatch, Deployed(), "--full") == 0
    full = capsys.readouterr()
    assert len(full.out) > len(short.out)
    assert "decoded in" in full.err


def test_the_script_asks_for_another_model_and_gpu(loaded, script, monkeypatch, capsys):
    found = Deployed()
    assert run(script, monkeypatch, found, "--model", "a/b", "--gpu", "H100") == 0
    assert found.options == {"gpu": "H100", "model": "a/b"}
    assert loaded[0][0].model == "a/b"


@pytest.mark.parametrize(
    ("fault", "line"),
    [(NotFoundError("no app"), "Model not deployed"), (AuthError("no token"), "modal setup")],
)
def test_the_script_says_what_is_missing(script, monkeypatch, capsys, fault, line):
    assert line in run(script, monkeypatch, Deployed(fault))
    assert not capsys.readouterr().out
