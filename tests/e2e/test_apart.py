"""Machines apart: network namespaces with a wire between, homes and users of their own.

They share no file but the program. Everything that passes between them is kept, and searched.
"""

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

from tests.e2e.conftest import BIN, end

PROMPT = "Hello there, whoever is listening on this wire"
WORDS = ("--text", PROMPT, "--max-tokens", "16", "--ignore-eos")
NETWORK = "10.213.8"
NEEDLE_BYTES = 16
BLOCK_BYTES = 4 << 20
ETH_P_ALL = 3
ETHERNET_BYTES = 14
TCP_SYN, TCP_ACK = 2, 16

pytestmark = pytest.mark.slow


class Capture:
    """All frames on some interfaces, from now on."""

    def __init__(self, interfaces):
        self.seen = bytearray()
        # Where connections have been opened to.
        self.dialed = set()
        self._interfaces = interfaces
        self._is_over = False
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._socket.settimeout(0.2)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._is_over:
            with suppress(TimeoutError):
                data, (interface, _, kind, *_) = self._socket.recvfrom(1 << 17)
                # What a machine sends comes in by its wire; it goes out by another's once more.
                if interface in self._interfaces and kind != socket.PACKET_OUTGOING:
                    self.seen += data
                    self._note_dial(data[ETHERNET_BYTES:])

    def _note_dial(self, packet):
        is_tcp = len(packet) > 20 and packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_TCP
        segment = packet[4 * (packet[0] & 15) :] if is_tcp else b""
        if len(segment) > 13 and segment[13] & (TCP_SYN | TCP_ACK) == TCP_SYN:
            self.dialed.add(socket.inet_ntoa(packet[16:20]))

    def stop(self):
        self._is_over = True
        self._thread.join()
        self._socket.close()
        return self.seen


class Network:
    """A bridge, and namespaces on it."""

    def __init__(self, directory):
        self.directory = directory
        self.mark = f"vp{os.getpid() % 100000}"
        self.bridge = f"{self.mark}b"
        self.places = {}
        self.processes = []

    def ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def open(self):
        self.ip("link", "add", self.bridge, "type", "bridge")
        self.ip("addr", "add", f"{NETWORK}.254/24", "dev", self.bridge)
        self.ip("link", "set", self.bridge, "up")

    def place(self, name):
        """A machine of its own: a namespace, an address, a user, a home."""
        number = len(self.places) + 1
        namespace, wire = f"{self.mark}{name}", f"{self.mark}{number}"
        self.ip("netns", "add", namespace)
        self.places[name] = place = SimpleNamespace(
            namespace=namespace, wire=wire, host=f"{NETWORK}.{number}", uid=20000 + number,
            home=self.directory / name,
        )  # fmt: skip
        self.ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self.ip("link", "set", wire, "master", self.bridge, "up")
        self.ip("-n", namespace, "addr", "add", f"{place.host}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            self.ip("-n", namespace, "link", "set", device, "up")
        place.home.mkdir(mode=0o700)
        os.chown(place.home, place.uid, place.uid)
        return place

    def hide(self, place, gate):
        """It can only dial out, and that to the gate; nothing that it says gets elsewhere."""
        wire = ("-n", place.namespace, "addr")
        self.ip(*wire, "flush", "dev", "eth0")
        self.ip(*wire, "add", f"{place.host}/32", "dev", "eth0")
        self.ip("-n", place.namespace, "route", "add", gate.host, "dev", "eth0")

    def command(self, place, program, *words):
        """As that place's user, who may read the program wherever it is, and own nothing else."""
        right = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
        user = ("--reuid", str(place.uid), "--regid", str(place.uid), "--clear-groups", *right)
        return [
            "ip", "netns", "exec", place.namespace, "setpriv", *user, BIN / program,
            *map(str, words),
        ]  # fmt: skip

    def environment(self, place):
        kept = {key: value for key, value in os.environ.items() if "VEILPIPE" not in key}
        return kept | {"HOME": str(place.home), "XDG_STATE_HOME": ""}

    def run(self, place, *words, timeout=180):
        return subprocess.run(
            self.command(place, "pipeline-orch", *words), capture_output=True, text=True,
            env=self.environment(place), cwd=place.home, timeout=timeout, check=False,
        )  # fmt: skip

    def run_python(self, place, program):
        subprocess.run(self.command(place, "python", "-c", program), check=True)

    def offer(self, place, *words):
        """A machine that offers itself, and its line."""
        words = ("offer", "--yes", "--threads", "1", *words)
        return self.start(place, "stage-worker", words, r"^VP1-\w+$")

    def start(self, place, program, words, pattern):
        """A process there, and what of its output fits the pattern."""
        log = self.directory / f"{place.namespace}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command(place, program, *words),
                stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                env=self.environment(place), cwd=place.home,
            )  # fmt: skip
        self.processes.append(process)
        until = time.monotonic() + 60
        while not (found := re.search(pattern, log.read_text(), re.MULTILINE)):
            assert time.monotonic() < until, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        return found[0]

    def interfaces(self):
        return {place.wire for place in self.places.values()}

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                end(process)
        for place in self.places.values():
            with suppress(subprocess.CalledProcessError):
                self.ip("netns", "del", place.namespace)
        with suppress(subprocess.CalledProcessError):
            self.ip("link", "del", self.bridge)


@pytest.fixture
def network(tmp_path):
    if os.geteuid() or not shutil.which("ip") or not shutil.which("setpriv"):
        pytest.skip("network namespaces and users need root, iproute2 and util-linux")
    network = Network(tmp_path)
    # Others' homes lie below this one, and are theirs alone.
    for parent in (tmp_path, *tmp_path.parents):
        with suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o011)
        if parent.parent.name in {"tmp", ""}:
            break
    try:
        network.open()
        network.place("home")
    except subprocess.CalledProcessError:
        network.close()
        pytest.skip("this system makes no network namespaces")
    yield network
    network.close()


def needles(data):
    step = max(1, len(data) // 8)
    return [data[i : i + NEEDLE_BYTES] for i in range(0, len(data) - NEEDLE_BYTES, step)]


def found_in(seen, parts):
    """Those of the parts, of four bytes at least, that lie anywhere in what was seen: in one pass.

    There are thousands of parts, and machines that measure the ways between them fill gigabytes.
    """
    by_start = {}
    for part in parts:
        by_start.setdefault(part[:4], []).append(part)
    pairs = np.array([tuple(start) for start in by_start], "u1").view("<u2").T
    begins, goes_on = np.zeros((2, 1 << 16), bool)
    begins[pairs[0]], goes_on[pairs[1]] = True, True
    found, data = set(), np.frombuffer(seen, "u1")
    for first in range(0, len(data) - 3, BLOCK_BYTES):
        for start in (first, first + 1):  # at even places, and at odd ones
            block = data[start : start + BLOCK_BYTES + 2]
            words = block[: len(block) & ~1].view("<u2")
            (near,) = np.nonzero(begins[words[:-1]])
            for place in start + 2 * near[goes_on[words[near + 1]]]:
                for part in by_start.get(bytes(seen[place : place + 4]), ()):
                    if seen[place : place + len(part)] == part:
                        found.add(part)
    return found


def activations_of(model_dir, token_ids):
    """Every row between two layers, as float32 and as bfloat16: any split sends some of them."""
    from pipeline.models.config import load_config
    from pipeline.models.registry import load_shard
    from pipeline.protocol.batch import Segment

    config = load_config(model_dir)
    for layer_end in range(1, config.num_layers):
        shard = load_shard(model_dir, config, 0, layer_end, expected_hashes=None)
        cache = shard.new_cache(1, len(token_ids))
        computed = shard.forward(np.array(token_ids), [Segment(0, 0, len(token_ids))], cache)
        (rows,) = shard.kernels.to_host(computed)
        assert rows.shape == (len(token_ids), config.hidden_dim)
        for row in rows.copy():
            where = f"behind layer {layer_end - 1}"
            yield f"a row {where}", needles(row.tobytes())
            yield f"a bfloat16 row {where}", needles(row.view("u2")[1::2].tobytes())


def secrets_of(model_dir, lines, text):
    """What must not be seen, by name: weights, rows, prompt and text, as bytes and token ids."""
    import base64

    from safetensors.numpy import load_file

    from pipeline.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer(model_dir / "tokenizer.json")
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        yield name, needles(tensor.tobytes())
    for name, said in (("prompt", PROMPT), ("text", text)):
        yield name, needles(said.encode())
        ids = tokenizer.encode(said)
        yield f"{name}'s ids", needles(b"".join(each.to_bytes(4, "little") for each in ids))
    yield from activations_of(model_dir, tokenizer.encode(text.removesuffix("\n")))
    for line in lines:
        body = line.removeprefix("VP1-")
        payload = base64.b32decode(body + "=" * (-len(body) % 8))
        yield "line", [payload[32:48], line.encode()[-60:]]


@pytest.fixture
def home(network, tiny_model):
    """The place of the prompt, with the model."""
    home = network.places["home"]
    shutil.copytree(tiny_model, home.home / "model")
    for path in (home.home / "model", *(home.home / "model").iterdir()):
        os.chown(path, home.uid, home.uid)
    return home


def test_a_machine_that_cannot_be_dialed_is_named_and_joined_through_a_relay(network, home):
    gate, hidden = network.place("gate"), network.place("m0")
    network.hide(hidden, gate)
    join = ("join", "--model-dir", "model", "-o", "cluster.json", "--push")
    refused = network.run(home, *join, network.offer(hidden))
    assert refused.returncode == 1
    (error,) = [line for line in refused.stderr.splitlines() if "error:" in line]
    assert f"{hidden.host}:9000" in error
    assert "can only dial out" in error
    assert "`pipeline-relay` that reaches it" in error
    end(network.processes[-1])
    maps = [f"0.0.0.0:{7000 + i}={hidden.host}:{9000 + i}" for i in range(2)]
    words = [word for each in maps for word in ("--map", each)]
    network.start(gate, "pipeline-relay", words, r"relaying .*:7001 ->")
    joined = network.run(home, *join, network.offer(hidden, "--address", f"{gate.host}:7000"))
    assert joined.returncode == 0, joined.stderr
    found = network.run(home, "--manifest", "cluster.json", *WORDS)
    assert found.returncode == 0, found.stderr
    assert found.stdout == alone(network, home)


@pytest.mark.parametrize("count", [2, 3])
def test_machines_apart_compute_what_one_does_and_tell_the_wire_nothing(
    network, home, tiny_model, count
):
    model_dir = home.home / "model"
    machines = [network.place(f"m{index}") for index in range(count)]
    thief = network.place("thief")
    capture = Capture(network.interfaces())
    try:
        said = b"what anybody on this wire can read"
        send = f"import socket; socket.socket(2, 2).sendto({said!r}, ({home.host!r}, 9))"
        network.run_python(thief, send)
        lines = [network.offer(machine) for machine in machines]
        joined = network.run(
            home, "join", *lines, "--model-dir", model_dir, "-o", "cluster.json", "--push"
        )
        assert joined.returncode == 0, joined.stderr
        assert len(joined.stdout.splitlines()) == count + 1
        found = network.run(home, "--manifest", "cluster.json", *WORDS)
        assert found.returncode == 0, found.stderr
        copied = network.run(thief, "join", lines[0], "--model-dir", tiny_model, "-o", "c.json")
        assert copied.returncode == 1
        assert "has been used already, by SHA256:" in copied.stderr
    finally:
        seen = capture.stop()
    assert found.stdout == alone(network, home)
    assert len(seen) > 1_000_000
    # Home may be behind a NAT: it dials, and nobody dials it.
    assert capture.dialed == {machine.host for machine in machines}
    names = {said: "said in the clear"}
    for name, parts in secrets_of(model_dir, lines, found.stdout):
        assert parts
        names |= dict.fromkeys(parts, name)
    # The search finds what does travel in the clear.
    assert {names[part] for part in found_in(seen, names)} == {"said in the clear"}
    for machine in machines:
        state = machine.home / ".local" / "state" / "veilpipe"
        assert {path.stat().st_uid for path in state.iterdir()} == {machine.uid}
        assert len(list((state / "parts").iterdir())) == 3


def alone(network, home):
    """What the whole model says in one process."""
    words = ("--model-dir", "model", "--stages", 1, "-o", "alone.json")
    assert network.run(home, "plan", *words).returncode == 0
    found = network.run(
        home, "--manifest", "alone.json", "--tokenizer", "model/tokenizer.json", *WORDS,
        "--supervise", "--model-dir", "model", "--dev",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout
