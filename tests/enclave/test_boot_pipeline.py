"""Two stages in two enclaves under QEMU, joined by the relay, driven from the host.

Everything is what runs in production but for three things: the security modules sign under a test
root, which orchestrator and stages are made to believe; an emulated guest reaches its parent as
CID 2; and the host's end of vsock is a UNIX socket.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from enclave import cli, eif, emulator

_BIN = Path(sys.executable).parent
_GUEST = Path(__file__).parent / "guest"
_TEXT = "What the relay carries must not tell anyone that the treasure lies under the old oak tree."
_NUM_TOKENS = 12
_HIDDEN_BYTES = 64 * 4
_CONTROL, _DATA, _RESULTS = 5000, 5001, 6000
_EMULATED_PARENT_CID = 2
_GUEST_MEMORY_MIB = 2560

# The orchestrator as it is, but for the root it believes: no option of it can say another.
_ORCHESTRATOR = """
import pathlib, sys
from cryptography import x509
import pipeline.agreement.trust_policy
root = x509.load_pem_x509_certificate(pathlib.Path(sys.argv.pop(1)).read_bytes())
pipeline.agreement.trust_policy.aws_root = lambda: root
from pipeline.cli.pipeline_orch import main
main()
"""

Address = tuple[str, int] | str


@dataclass(frozen=True, slots=True)
class Site:
    """The user's files, and what stands between the user and the two enclaves."""

    boot: Any
    directory: Path
    model: Path
    base_port: int
    taps: dict[str, Any]

    @property
    def manifest(self) -> Path:
        return self.directory / "manifest.json"

    def changed(self, change: Any) -> Path:
        """A copy of the manifest after `change` has been called on its stages."""
        manifest = json.loads(self.manifest.read_text())
        change(manifest["stages"])
        path = self.directory / "changed.json"
        path.write_text(json.dumps(manifest))
        return path

    def generate(
        self, manifest: Path, patience_s: float = 300
    ) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", _ORCHESTRATOR, self.boot.directory / "authority/root.pem"]
        command += ["--manifest", manifest, *_prompt(self.model)]
        command += ["--identity", self.directory / "identity.pem"]
        command += ["--connect-timeout", str(patience_s), "--latency-out", self.latencies]
        command += ["--data-out-listen", f"127.0.0.1:{self.base_port + 30}"]
        return subprocess.run(command, capture_output=True, timeout=patience_s + 60)

    @property
    def latencies(self) -> Path:
        return self.directory / "latencies.json"

    def clear(self) -> None:
        for tap in self.taps.values():
            tap.seen.clear()

    @contextmanager
    def reached_through(self, **targets: str) -> Iterator[None]:
        """Lead the named taps where other ones lead: what a malicious relay can do."""
        own = {name: tap.target for name, tap in self.taps.items()}
        for name, other in targets.items():
            self.taps[name].target = own[other]
        try:
            yield
        finally:
            for name, target in own.items():
                self.taps[name].target = target


def _prompt(model: Path) -> list[Any]:
    words = ["--tokenizer", model / "tokenizer.json", "--text", _TEXT]
    return [*words, "--max-tokens", str(_NUM_TOKENS), "--ignore-eos"]


def _orch(*arguments: object) -> str:
    command = [_BIN / "pipeline-orch", *map(str, arguments)]
    return subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE).stdout.decode()


def _free_base_port() -> int:
    for base in range(24000 + os.getpid() % 500 * 10, 60000, 100):
        with ExitStack() as stack:
            try:
                for port in range(base, base + 40):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return base
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def base_port() -> int:
    return _free_base_port()


@pytest.fixture(scope="module")
def images(boot: Any, tiny_model: Path, base_port: int) -> list[Path]:
    """One image for each stage, with its own shard only; manifest.json pins both."""
    directory = boot.directory / "pipeline"
    directory.mkdir()
    key = _orch("keygen", directory / "identity.pem").strip()
    options = ["--stages", 2, "--vsock", "--base-port", base_port, "--orchestrator-key", key]
    plan = directory / "plan.json"
    _orch("plan", "--model-dir", tiny_model, *options, "-o", plan)
    _orch("shard", "--manifest", plan, "--model-dir", tiny_model, "-o", directory / "shards")
    manifest = json.loads((directory / "shards/manifest.json").read_text())
    for stage in manifest["stages"]:
        stage["endpoint"]["data_out"]["cid"] = _EMULATED_PARENT_CID
    stages = manifest["stages"]
    stages[1]["endpoint"]["data_in"] = stages[0]["endpoint"]["data_out"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return [_build(boot, directory, idx) for idx in range(2)]


def _build(boot: Any, directory: Path, idx: int) -> Path:
    stage = directory / f"shards/stage{idx}"
    (stage / "test_root.pem").write_bytes((boot.directory / "authority/root.pem").read_bytes())
    (stage / "launcher.py").write_bytes((_GUEST / "launcher.py").read_bytes())
    run = json.loads((stage / "run.json").read_text())
    at = run["argv"].index("-m")
    run["argv"][at : at + 2] = ["/stage/launcher.py"]
    (stage / "run.json").write_text(json.dumps(run))
    image = directory / f"stage{idx}.eif"
    assert cli.main(["build", "--stage-dir", str(stage), "-o", str(image)]) == 0
    pinned = ["--manifest", str(directory / "manifest.json"), "--stage", str(idx)]
    assert cli.main(["pin", str(image), *pinned]) == 0
    return image


@pytest.fixture(scope="module")
def site(boot: Any, tiny_model: Path, images: list[Path], base_port: int) -> Iterator[Site]:
    """Both enclaves booting, the relay running, taps before every door of the relay."""
    machines = [
        boot.machine(f"s{idx}", image, cid=16 + idx, cpus=1, memory_mib=_GUEST_MEMORY_MIB)
        for idx, image in enumerate(images)
    ]
    directory, vsock = boot.directory, [machine.vsock for machine in machines]
    inner = {
        "control0": f"tcp:127.0.0.1:{base_port + 20}=unix:{vsock[0]}:{_CONTROL}",
        "data": f"tcp:127.0.0.1:{base_port + 21}=unix:{vsock[0]}:{_DATA}",
        "control1": f"tcp:127.0.0.1:{base_port + 22}=unix:{vsock[1]}:{_CONTROL}",
        "between": f"unix:{directory}/between.sock=unix:{vsock[1]}:{_DATA}",
        "results": f"unix:{directory}/results.sock=tcp:127.0.0.1:{base_port + 30}",
    }
    outer: dict[str, Address] = {
        "control0": ("127.0.0.1", base_port),
        "data": ("127.0.0.1", base_port + 1),
        "control1": ("127.0.0.1", base_port + 2),
        "between": f"{vsock[0]}_{_RESULTS}",
        "results": f"{vsock[1]}_{_RESULTS + 1}",
    }
    with ExitStack() as stack:
        for machine in machines:
            stack.enter_context(emulator.booted(machine, boot.tools))
        stack.enter_context(_relaying(directory / "relay.log", list(inner.values())))
        taps = {}
        for name, address in outer.items():
            taps[name] = boot.tap(address, _first_address(inner[name]))
            stack.callback(taps[name].close)
        yield Site(boot, directory / "pipeline", tiny_model, base_port, taps)


def _first_address(mapping: str) -> Address:
    scheme, _, rest = mapping.partition("=")[0].partition(":")
    host, _, port = rest.rpartition(":")
    return rest if scheme == "unix" else (host, int(port))


@contextmanager
def _relaying(log: Path, maps: list[str]) -> Iterator[None]:
    """The real command, up once it has named every map it carries."""
    arguments = [word for mapping in maps for word in ("--map", mapping)]
    with log.open("wb") as file:
        relay = subprocess.Popen([_BIN / "pipeline-relay", *arguments], stderr=file)
    try:
        deadline = time.monotonic() + 30
        while log.read_text().count("relaying ") < len(maps):
            assert relay.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        relay.terminate()
        assert relay.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def attested(site: Site) -> tuple[subprocess.CompletedProcess[bytes], dict[str, bytes]]:
    """A generation over both enclaves, and what every tap saw of it. Waits while they boot."""
    done = site.generate(site.manifest)
    return done, {name: bytes(tap.seen) for name, tap in site.taps.items()}


def _generate_locally(directory: Path, model: Path) -> bytes:
    """What an ordinary stage on this machine generates."""
    _orch("plan", "--model-dir", model, "--stages", 1, "--base-port", _free_base_port(),
          "-o", directory / "local.json")  # fmt: skip
    manifest = ["--manifest", directory / "local.json", "--dev"]
    environment = {**os.environ, "VEILPIPE_DEV_DIR": str(directory / "dev")}
    worker = [_BIN / "stage-worker", *manifest, "--stage-idx", "0", "--model-dir", model]
    with subprocess.Popen(worker, env=environment, stderr=subprocess.DEVNULL) as process:
        command = [_BIN / "pipeline-orch", *manifest, *_prompt(model)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
        finally:
            process.terminate()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_enclaves_generate_what_an_ordinary_stage_does(attested: Any, site: Site) -> None:
    done, _ = attested
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(_TEXT.encode())
    assert done.stdout == _generate_locally(site.directory, site.model)


def test_images_hold_their_own_shard_only(images: list[Path], site: Site) -> None:
    for idx, image in enumerate(images):
        data = image.read_bytes()
        own, other = (
            (site.directory / f"shards/stage{which}/model.safetensors").read_bytes()
            for which in (idx, 1 - idx)
        )
        assert own in data
        assert other[-4096:] not in data


def test_nothing_secret_passes_the_relay_or_shows_on_a_console(attested: Any, site: Site) -> None:
    _, seen = attested
    # Prompt and activations did come by: each position's are a row of 32-bit floats.
    assert all(seen.values())
    assert len(seen["between"]) > len(_TEXT) * _HIDDEN_BYTES
    consoles = b"".join((site.boot.directory / f"s{idx}.log").read_bytes() for idx in range(2))
    carried = b"".join(seen.values()) + consoles + (site.boot.directory / "relay.log").read_bytes()
    for name, secret in _secrets(site):
        assert not any(window in carried for window in _windows(secret)), name


def test_the_search_would_find_what_travels_in_the_clear(site: Site) -> None:
    for name, secret in _secrets(site):
        assert any(window in b"noise" + secret + b"noise" for window in _windows(secret)), name


def _secrets(site: Site) -> Iterator[tuple[str, bytes]]:
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    prompt = Tokenizer.from_file(str(site.model / "tokenizer.json")).encode(_TEXT).ids
    tokens = json.loads(site.latencies.read_text())["token_ids"]
    yield "prompt", _TEXT.encode()
    for name, ids in (("prompt ids", prompt), ("token ids", tokens)):
        yield name, b"".join(each.to_bytes(4, "little") for each in ids)
    for name, tensor in load_file(site.model / "model.safetensors").items():
        yield name, tensor.numpy().tobytes()
    model = AutoModelForCausalLM.from_pretrained(site.model, dtype=torch.float32)
    states = model(torch.tensor([prompt + tokens]), output_hidden_states=True).hidden_states
    for layer, state in enumerate(states):
        yield f"activations after layer {layer}", state.detach().numpy().tobytes()


def _windows(data: bytes, size: int = 16) -> list[bytes]:
    step = max(1, (len(data) - size) // 256)
    return [data[i : i + size] for i in range(0, len(data) - size + 1, step)]


def _refused(site: Site, manifest: Path, *words: str, patience_s: float = 60) -> None:
    site.clear()
    done = site.generate(manifest, patience_s)
    errors = [line for line in done.stderr.decode().splitlines() if "error:" in line]
    assert (done.returncode, done.stdout, len(errors)) == (1, b"", 1), done.stderr.decode()
    for word in words:
        assert word in errors[0]
    # No data channel was ever dialled, so no byte of the prompt can have left.
    assert not site.taps["data"].seen


@pytest.mark.usefixtures("attested")
@pytest.mark.parametrize("index", ["0", "1", "2"])
def test_another_measurement_than_pinned_is_refused(site: Site, index: str) -> None:
    def change(stages: list[Any]) -> None:
        pcrs = stages[1]["expected_measurements"]
        pcrs[index] = f"{int(pcrs[index], 16) ^ 1:096x}"

    _refused(site, site.changed(change), "stage 1", "pcrs", f"PCR {index} differ")


@pytest.mark.usefixtures("attested")
def test_the_image_of_another_stage_is_refused(site: Site) -> None:
    """The user was made to pin stage 1's image for stage 0; then the true one is another."""

    def change(stages: list[Any]) -> None:
        stages[0]["expected_measurements"] = stages[1]["expected_measurements"]

    _refused(site, site.changed(change), "stage 0", "pcrs")


@pytest.mark.usefixtures("attested")
def test_swapped_stages_are_refused(site: Site) -> None:
    with site.reached_through(control0="control1", control1="control0"):
        _refused(site, site.manifest, "stage")


@pytest.mark.usefixtures("attested")
def test_stage_1_where_stage_0_should_be_is_refused(site: Site) -> None:
    with site.reached_through(control0="control1"):
        _refused(site, site.manifest, "stage 0")


def test_one_changed_byte_of_a_stage_is_refused(site: Site, images: list[Path]) -> None:
    """An image that differs in a comment boots and serves; it is not the one that was pinned."""
    image = eif.unpack(images[0].read_bytes())
    comment = b"# measured with the rest"
    sections = []
    for section in image.sections:
        data = bytes(section.data)
        if section.type is eif.SectionType.RAMDISK and comment in data:
            assert data.count(comment) == 1
            data = data.replace(comment, comment[:-1] + b"T")
        sections.append(eif.Section(section.type, data))
    altered = site.boot.directory / "altered.eif"
    with altered.open("wb") as file:
        for piece in eif.pack(eif.Image(tuple(sections))):
            file.write(piece)
    machine = site.boot.machine("altered", altered, cid=18, memory_mib=_GUEST_MEMORY_MIB)
    mapping = f"tcp:127.0.0.1:{site.base_port + 25}=unix:{machine.vsock}:{_CONTROL}"
    log = site.boot.directory / "relay-altered.log"
    with emulator.booted(machine, site.boot.tools), _relaying(log, [mapping]):
        site.boot.dial(machine.vsock, _CONTROL).close()
        site.taps["control0"].target = ("127.0.0.1", site.base_port + 25)
        _refused(site, site.manifest, "stage 0", "pcrs")
