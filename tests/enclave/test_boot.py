"""Boots an image under QEMU and talks to it; scripts/test_enclave.sh sets up what it needs."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from enclave import build, cli, eif, emulator
from transport.attestation import document_verifier
from transport.attestation.evidence_binding import Binding, user_data
from transport.errors import AttestationError

_PARENT_PORT = 7000

Ask = Callable[..., Any]
Attest = Callable[[Binding], bytes]


@pytest.fixture(scope="module")
def image(boot: Any) -> eif.Image:
    return eif.unpack((boot.directory / "probe.eif").read_bytes())


@pytest.fixture(scope="module")
def vsock(boot: Any) -> Iterator[Path]:
    """The socket of an enclave whose documents are signed under the test root."""
    machine = boot.machine("signed", boot.directory / "probe.eif", memory_mib=1024)
    with boot.answering(machine):
        yield machine.vsock


@pytest.fixture(scope="module")
def ask(boot: Any, vsock: Path) -> Ask:
    return partial(boot.ask, vsock)


@pytest.fixture(scope="module")
def attest(boot: Any, vsock: Path) -> Attest:
    return partial(_attest, boot, vsock)


@pytest.fixture(scope="module")
def test_root(boot: Any) -> x509.Certificate:
    return boot.root


@pytest.fixture
def binding() -> Binding:
    return Binding(b"stage/0", *(secrets.token_bytes(32) for _ in range(3)))


def _count_once(listener: socket.socket, num_bytes: int) -> None:
    """Take one connection and answer, once all bytes are there, how many they are."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(30)
        count = 0
        while count < num_bytes and (chunk := connection.recv(1 << 16)):
            count += len(chunk)
        connection.sendall(count.to_bytes(8, "big"))


def _now() -> datetime:
    return datetime.now(UTC)


def _attest(boot: Any, vsock: Path, binding: Binding) -> bytes:
    return boot.attest(
        vsock,
        nonce=binding.nonce,
        user_data=user_data(binding),
        public_key=binding.static_key,
    )


def test_registers_inside_are_those_computed_from_the_file(ask: Ask, image: eif.Image) -> None:
    inside = {int(index): value for index, value in ask("registers").items()}
    assert inside == {index: value.hex() for index, value in eif.measure(image).items()}


def test_security_module_describes_itself(ask: Ask) -> None:
    description = ask("describe")
    assert description["digest"] == "SHA384"
    assert set(range(16)) <= set(description["locked_pcrs"])


def test_security_module_gives_fresh_entropy(ask: Ask) -> None:
    first, second = ask("random"), ask("random")
    assert len(first) == len(second) == 512
    assert first != second


def test_clock_inside_is_right_enough_to_judge_certificates(ask: Ask) -> None:
    assert abs(ask("system")["time"] - time.time()) < 10


def test_init_prepared_the_machine(ask: Ask) -> None:
    system = ask("system")
    assert system["entropy_bits"] == 256
    assert "lo:" in system["interfaces"]
    assert system["is_first_process_init"]
    assert system["stage_files"] == ["probe.py", "run.json"]


def test_compiled_modules_are_of_the_python_inside(ask: Ask) -> None:
    compiled = list(build.code_closure().compiled)
    assert compiled
    assert ask("import", modules=compiled) == compiled


def test_signed_document_is_accepted_under_its_root(
    attest: Attest, image: eif.Image, test_root: x509.Certificate, binding: Binding
) -> None:
    expected = eif.measure(image)
    verifier = document_verifier.NitroVerifier(test_root, expected, clock=_now)
    attested = verifier.verify(attest(binding), binding)
    assert {index: attested.measurements[index] for index in expected} == expected


def test_signed_document_is_refused_under_the_production_root(
    attest: Attest, image: eif.Image, binding: Binding
) -> None:
    verifier = document_verifier.NitroVerifier(
        document_verifier.aws_root(), eif.measure(image), clock=_now
    )
    with pytest.raises(AttestationError) as refusal:
        verifier.verify(attest(binding), binding)
    assert refusal.value.check == "root"


def test_document_of_another_image_is_refused(
    attest: Attest, image: eif.Image, test_root: x509.Certificate, binding: Binding
) -> None:
    stage = image.of_type(eif.SectionType.RAMDISK)[-1]
    at = next(index for index, each in enumerate(image.sections) if each.data is stage)
    changed = eif.Section(eif.SectionType.RAMDISK, bytes(stage[:-1]) + bytes([stage[-1] ^ 1]))
    sections = (*image.sections[:at], changed, *image.sections[at + 1 :])
    verifier = document_verifier.NitroVerifier(
        test_root, eif.measure(eif.Image(sections)), clock=_now
    )
    with pytest.raises(AttestationError) as refusal:
        verifier.verify(attest(binding), binding)
    assert refusal.value.check == "pcrs"


def test_document_with_another_nonce_is_refused(
    attest: Attest, image: eif.Image, test_root: x509.Certificate, binding: Binding
) -> None:
    verifier = document_verifier.NitroVerifier(test_root, eif.measure(image), clock=_now)
    stale = Binding(binding.role, binding.handshake_hash, binding.static_key, bytes(32))
    with pytest.raises(AttestationError) as refusal:
        verifier.verify(attest(stale), binding)
    assert refusal.value.check == "nonce"


def test_eight_mebibytes_survive_the_way_in_and_out(boot: Any, vsock: Path) -> None:
    payload = secrets.token_bytes(8 << 20)
    with boot.dial(vsock) as connection, connection.makefile("rwb") as stream:
        stream.write(json.dumps({"op": "echo", "bytes": len(payload)}).encode() + b"\n")
        stream.write(payload)
        stream.flush()
        assert stream.read(len(payload)) == payload


def test_enclave_dials_a_port_of_its_parent(ask: Ask, vsock: Path) -> None:
    num_bytes = 1 << 20
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{vsock}_{_PARENT_PORT}")
        listener.listen()
        listener.settimeout(30)
        counted = threading.Thread(target=_count_once, args=(listener, num_bytes))
        counted.start()
        assert ask("dial_parent", bytes=num_bytes) == num_bytes
        counted.join()


def test_vsock_loops_back_inside_the_guest(ask: Ask) -> None:
    assert ask("loopback", bytes=1 << 20) == 1 << 20


def test_unsigned_document_of_the_emulation_is_refused(
    boot: Any, image: eif.Image, test_root: x509.Certificate, binding: Binding
) -> None:
    probe = boot.directory / "probe.eif"
    machine = boot.machine("plain", probe, memory_mib=1024, signing_dir=None)
    with emulator.booted(machine, boot.tools):
        document = _attest(boot, machine.vsock, binding)
    for root in (test_root, document_verifier.aws_root()):
        with pytest.raises(AttestationError) as refusal:
            document_verifier.NitroVerifier(root, eif.measure(image), clock=_now).verify(
                document, binding
            )
        assert refusal.value.check == "cose"


def test_image_with_a_wrong_crc_is_refused_by_every_reader(
    boot: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((boot.directory / "probe.eif").read_bytes())
    data[-1] ^= 1
    damaged = boot.directory / "damaged.eif"
    damaged.write_bytes(data)
    for command in ("describe", "verify"):
        assert cli.main([command, str(damaged)]) == 2
        assert "CRC-32" in capsys.readouterr().err
    machine = boot.machine("damaged", damaged)
    with emulator.booted(machine, boot.tools) as process:
        assert process.wait(timeout=30) == 1
    assert "CRC mismatch" in machine.console.read_text()
