"""Commands for one's own machines: units that systemd takes, and one line for every bad input."""

import builtins
import fcntl
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from typer.main import get_command

from pipeline.agreement.identity import ORCHESTRATOR_KEY, own_identity
from pipeline.agreement.manifest import dump_manifest
from pipeline.cli import machine, own_address, pipeline_orch
from pipeline.cli.cluster_plan import ClusterPlan
from pipeline.cli.progress import progress_rows
from pipeline.cli.software import software_version
from pipeline.errors import InputError
from pipeline.machines.known_homes import KnownHomes
from pipeline.machines.offer_line import OfferLine
from pipeline.planning.plan import PlanOptions, plan
from transport.dial_and_listen import TcpEndpoint

KEY = bytes(range(32))


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Runs a command in this process: exit code, stdout, stderr's lines."""
    monkeypatch.setenv("VEILPIPE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        module = machine if words[0] in {"offer", "serve", "service"} else pipeline_orch
        name = "stage-worker" if module is machine else "pipeline-orch"
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            module.main()
        out, err = capfd.readouterr()
        return caught.value.code, out, err.splitlines()

    return run


def joined(tmp_path):
    own_identity(tmp_path / "state", ORCHESTRATOR_KEY)
    KnownHomes(tmp_path / "state").add(KEY)


def test_a_unit_runs_serve_with_the_flags_that_are_given(run, tmp_path):
    words = ("--listen", "0.0.0.0:9100", "--threads", "2", "--disk", "40", "--kv-memory", "1.5")
    code, unit, _ = run("service", *words)
    assert code == 0
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert line.startswith("/")
    assert " serve " in line
    given = {word for word in line.split() if word.startswith("--")}
    assert given == {word for word in words if word.startswith("--")}
    command = get_command(machine.app).commands["serve"]
    assert given <= {name for parameter in command.params for name in parameter.opts}
    assert f"VEILPIPE_STATE_DIR={tmp_path}" in unit
    assert "listen" not in run("service")[1]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(run, tmp_path):
    path = tmp_path / "veilpipe-machine.service"
    unit = run("service", "--listen", "[::]:9000")[1]
    path.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit, flags=re.MULTILINE))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False
    )
    assert not [line for line in found.stderr.splitlines() if path.name in line]


def test_a_unit_holds_no_line_that_somebody_slips_in(run, monkeypatch):
    monkeypatch.setenv("VEILPIPE_STATE_DIR", "/tmp/x\nExecStartPre=/bin/evil")
    code, out, err = run("service")
    assert (code, out) == (2, "")
    assert "cannot be written into a unit" in err[-1]
    monkeypatch.setenv("VEILPIPE_STATE_DIR", "/tmp/100% mine")
    assert "100%% mine" in run("service")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve",), "no home has joined this machine yet"),
        (("serve", "--listen", "unix:/tmp/x"), "a machine of one's own is reached at HOST:PORT"),
        (("serve", "--listen", "nonsense"), "--listen nonsense"),
        (("serve", "--listen", "127.0.0.1:65535"), "65535 has none"),
        (("serve", "--kernels", "fast"), "--kernels fast: use auto"),
        (("serve", "--disk", "-1"), "--disk -1"),
        (("offer", "--yes", "--address", "unix:/tmp/x"), "--address unix:/tmp/x: write HOST:PORT"),
        (("offer", "--yes", "--address", "a.example:65535"), "stages connect at the next port"),
        (("join",), "missing --model-dir"),
        (("join", "--model-dir", "MODEL"), "give a line of `stage-worker offer`"),
        (("join", "VP1-ABCDEFGH", "--model-dir", "MODEL"), "mistyped or not whole"),
        (("join", "LINE", "LINE", "--model-dir", "MODEL"), "two lines are of the machine at 10."),
        (("join", "LINE", "--model-dir", "nowhere"), "nowhere"),
        (("join", "LINE", "--model-dir", "MODEL", "--dtype", "int3"), "--dtype int3"),
        (("join", "LINE", "--model-dir", "MODEL", "--home", "unix:/x"), "--home unix:/x"),
        (("join", "LINE", "--model-dir", "MODEL", "-o", "no/such/c.json"), "cannot write no/such"),
        (("join", "LINE", "--model-dir", "MODEL", "--remove", "x:1"), "--remove x:1"),
        (("push", "--manifest", "nowhere.json"), "cannot read manifest nowhere.json"),
        (("push", "--manifest", "PLAIN"), "names no machine of your own"),
        (("parts", "--manifest", "PLAIN"), "names no machine of your own"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(run, words, message, tiny_model, tmp_path):
    (tmp_path / "plain.json").write_text(dump_manifest(plan(tiny_model, PlanOptions(2))))
    line = str(OfferLine.new(TcpEndpoint("10.255.255.1", 9), KEY))
    meant = {"MODEL": str(tiny_model), "LINE": line, "PLAIN": "plain.json"}
    code, out, err = run(*(meant.get(word, word) for word in words))
    assert (code, out) == (2, "")
    assert message in err[-1]
    assert sum("error:" in each for each in err) == 1


def test_a_port_in_use_is_one_line(run, tmp_path):
    joined(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--listen", f"127.0.0.1:{port}")
    assert code == 2
    assert f"cannot listen on tcp:127.0.0.1:{port}" in err[-1]


def test_one_machine_is_one_process(run, tmp_path):
    joined(tmp_path)
    with (tmp_path / "state" / machine.LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run("serve", "--listen", "127.0.0.1:0")
    assert code == 2
    assert "another `stage-worker` is this machine already" in err[-1]


async def test_who_offers_a_machine_is_told_where_it_must_be_reached_and_by_what_it_can_be(capfd):
    listening = SimpleNamespace(
        own=X25519PrivateKey.generate(), software="1", let_in=lambda home: None
    )
    flags = SimpleNamespace(yes=True, qr=False)
    machine._open_offer(listening, flags, TcpEndpoint("192.168.1.7", 9000))
    told = capfd.readouterr().err
    assert "home will dial 192.168.1.7:9000 and the next port" in told
    assert "NAT" in told
    assert "`pipeline-relay` that reaches it, and give that address as --address" in told


def test_nobody_is_let_in_where_nobody_can_be_asked(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    code, out, err = run("offer")
    assert (code, out) == (2, "")
    assert "give --yes" in err[-1]


def test_a_line_can_be_photographed_where_a_library_draws_it(capsys, monkeypatch):
    machine._show_qr(str(OfferLine.new(TcpEndpoint("10.0.0.1", 9000), KEY)))
    drawn = capsys.readouterr().out
    assert len(drawn.splitlines()) > 15
    genuine = builtins.__import__

    def without(name, *rest):
        if name == "segno":
            raise ImportError(name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install segno"):
        machine._show_qr("VP1-A")


def test_others_are_told_an_address_that_is_not_loopbacks(monkeypatch):
    named = TcpEndpoint("192.0.2.7", 9000)
    assert own_address.own_address(named) == named
    monkeypatch.setattr(own_address, "_of_an_interface", lambda: "10.1.2.3")
    monkeypatch.setattr(own_address, "_FAR", ())
    anywhere = TcpEndpoint("0.0.0.0", 9000)
    assert own_address.own_address(anywhere) == TcpEndpoint("10.1.2.3", 9000)
    monkeypatch.setattr(own_address, "_of_an_interface", lambda: None)
    with pytest.raises(InputError, match="--address"):
        own_address.own_address(anywhere)


def test_an_interface_is_asked_for_its_address():
    found = own_address._of_an_interface()
    assert found is None or not found.startswith("127.")


def test_who_listens_by_ipv6_is_told_by_an_ipv6_address(monkeypatch, tmp_path):
    listed = tmp_path / "if_inet6"
    monkeypatch.setattr(own_address, "_IF_INET6", listed)
    monkeypatch.setattr(own_address, "_FAR", ())
    monkeypatch.setattr(own_address, "_of_an_interface", lambda: "10.1.2.3")
    anywhere = TcpEndpoint("::", 9000)
    own = ["00000000000000000000000000000001 01 80 10 80       lo"]
    own += ["fe800000000000000000000000000003 02 40 20 80       e0"]
    listed.write_text("\n".join(own) + "\n")
    with pytest.raises(InputError, match="--address"):
        own_address.own_address(anywhere)
    own += ["fd770000000000000000000000000003 02 40 00 80       e0"]
    listed.write_text("\n".join(own) + "\n")
    assert own_address.own_address(anywhere) == TcpEndpoint("fd77::3", 9000)
    listed.unlink()
    with pytest.raises(InputError, match="--address"):
        own_address.own_address(anywhere)


def surveyed(*kernels):
    def each(index, name):
        address = SimpleNamespace(host_port=f"10.0.0.{index}:9000")
        return SimpleNamespace(address=address, description=SimpleNamespace(kernels=name))

    return SimpleNamespace(machines=[each(index, name) for index, name in enumerate(kernels)])


def test_kernels_that_round_differently_are_mixed_by_a_flag_alone():
    cluster = ClusterPlan(Path("d"), Path("cluster.json"), "float32", own=None)
    cluster.check_kernels(surveyed("native", "native"))
    with pytest.raises(InputError, match=r"native: 10\.0\.0\.0:9000; torch: 10\.0\.0\.1:9000"):
        cluster.check_kernels(surveyed("native", "torch"))
    replace(cluster, mixes_kernels=True).check_kernels(surveyed("native", "torch"))


def test_the_version_is_the_installations():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", software_version())


def test_where_nobody_watches_no_bars_are_drawn():
    with progress_rows(["a", "b"]) as progress:
        assert progress(1) is None
