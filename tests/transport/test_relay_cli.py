import json
import signal
import socket
import subprocess
import sys

import pytest

from transport.dial_and_listen import TcpEndpoint, VsockEndpoint
from transport.errors import EndpointError
from transport.relay import RelayMap, parse_map
from transport.relay_cli import parse_maps


def test_map_is_parsed():
    mapping = parse_map("tcp:0.0.0.0:9000=vsock:16:5000", 3)
    assert mapping == RelayMap(TcpEndpoint("0.0.0.0", 9000), VsockEndpoint(16, 5000), 3)
    assert str(mapping) == "tcp:0.0.0.0:9000=vsock:16:5000"


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["foo"], "'foo' is not LISTEN=TARGET"),
        (["a:1=b:2=c:3"], "is not LISTEN=TARGET"),
        (["=a:1"], "address '' is not valid"),
        (["a:1="], "address '' is not valid"),
        (["a:1=vsock:x:1"], "'x' in address 'vsock:x:1'"),
        (["a:1=b:1", "a:1=c:1"], "tcp:a:1 listens for more than one map"),
    ],
)
def test_bad_map_is_named(texts, named):
    with pytest.raises(EndpointError) as caught:
        parse_maps(texts, 8)
    assert named in str(caught.value)


def test_limit_that_carries_nothing_is_refused():
    with pytest.raises(EndpointError, match="choose 1 or more"):
        parse_map("a:1=b:1", 0)


def command(*arguments):
    return [sys.executable, "-m", "transport.relay_cli", *arguments]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_relays_until_a_signal_and_writes_its_metrics(tmp_path, number):
    entrance = tmp_path / "in.sock"
    path = tmp_path / "metrics.json"
    with socket.socket(socket.AF_UNIX) as target:
        target.bind(str(tmp_path / "out.sock"))
        target.listen()
        mapping = f"unix:{entrance}=unix:{tmp_path}/out.sock"
        process = subprocess.Popen(
            command("--map", mapping, "--metrics-out", str(path)), stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stderr.readline().startswith(f"relaying unix:{entrance} -> ")
            with socket.socket(socket.AF_UNIX) as near:
                near.connect(str(entrance))
                far, _ = target.accept()
                with far:
                    near.sendall(b"hello")
                    assert far.recv(5) == b"hello"
                    process.send_signal(number)
                    assert process.wait(300) == 0
                    assert far.recv(1) == b""
            assert "Traceback" not in process.stderr.read()
    assert not entrance.exists()
    assert json.loads(path.read_text())["maps"][0]["bytes_to_target"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--map", "foo"], 2, "map 'foo' is not LISTEN=TARGET"),
        (["--map", "192.0.2.1:0=a:1"], 1, "choose an address of this machine"),
        (["--map", "127.0.0.1:0=a:1", "--metrics-out", "/no/m.json"], 2, "no writable directory"),
    ],
)
def test_command_ends_with_one_clear_line(arguments, code, line):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("pipeline-relay: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_relay_needs_neither_torch_nor_the_pipeline():
    code = "import sys, transport.relay_cli; print({'torch', 'pipeline'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
