"""Ray as an engine, where there is none that would do."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from pipeline.placement.ray.engine import EngineUnusable, RayEngine
from pipeline.placement.ray.messages import Job

JOB = Job(address="h:1", strategy="SPREAD", needs={"CPU": 1.0}, core="{}", arguments=((), ()))


def refused(monkeypatch, ray):
    """Why it cannot be used, where `ray` is what is imported by that name."""
    monkeypatch.setitem(sys.modules, "ray", ray)
    engine = RayEngine(JOB)
    with pytest.raises(EngineUnusable) as caught:
        engine.connect()
    engine.close()  # there is nothing to end
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ray", [None, ModuleType("ray")], ids=["absent", "left behind"])
def test_without_ray_it_is_named_what_has_it(monkeypatch, ray):
    assert "Ray is not installed here; `pip install 'veilpipe[ray]'`" in refused(monkeypatch, ray)


@pytest.mark.parametrize("version", ["2.9.3", "2.51.1", "1.13.0", "3", "unknown", ""])
def test_a_version_that_asks_for_no_token_is_refused(monkeypatch, version):
    said = refused(monkeypatch, SimpleNamespace(__version__=version))
    assert said == f"Ray {version} asks for no token; install 2.52 or newer"


@pytest.mark.parametrize("version", ["2.52.0", "2.60.0", "3.0.0.dev0", "10.1rc1"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no cluster\nat all\n"), "no cluster: nothing answers there, or it asks"),
        (RuntimeError("versions differ:\n  Ray: 2.59"), "versions differ:"),
        (ValueError(""), "ValueError"),
    ],
    ids=["nobody", "another version", "no words"],
)
def test_a_cluster_that_refuses_is_told_of_in_its_first_line(monkeypatch, version, error, said):
    def init(**options):
        assert options["address"] == "h:1"
        raise error

    assert refused(monkeypatch, SimpleNamespace(__version__=version, init=init)).startswith(said)
