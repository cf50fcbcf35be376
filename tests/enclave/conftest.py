"""Small images and keys for the tests of this folder, and what those share that boot images."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from enclave import eif, emulator

PROBE_PORT = 5000
BOOT_DEADLINE_S = 120.0


Address = tuple[str, int] | str


class Tap:
    """Carries what comes in at one address to another, and keeps a copy of every byte."""

    def __init__(self, listen: Address, target: Address) -> None:
        self.target = target
        self.seen = bytearray()
        self._listener = socket.socket(_family(listen), socket.SOCK_STREAM)
        if isinstance(listen, tuple):
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(listen)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        carriers: list[threading.Thread] = []
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                break
            carriers.append(threading.Thread(target=self._carry, args=(near,)))
            carriers[-1].start()
        for carrier in carriers:
            carrier.join()

    def _carry(self, near: socket.socket) -> None:
        with near, socket.socket(_family(self.target), socket.SOCK_STREAM) as far:
            try:
                far.connect(self.target)
            except OSError:
                return
            back = threading.Thread(target=self._copy, args=(far, near))
            back.start()
            self._copy(near, far)
            back.join()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.seen += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for each in (source, sink):
                try:
                    each.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass


def _family(address: Address) -> int:
    return socket.AF_UNIX if isinstance(address, str) else socket.AF_INET


@dataclass(frozen=True, slots=True)
class Boot:
    """Where scripts/test_enclave.sh left what boot tests need: images, authority, tools."""

    directory: Path
    tools: Path

    @property
    def root(self) -> x509.Certificate:
        """The root of the authority under which emulated security modules sign."""
        return x509.load_pem_x509_certificate((self.directory / "authority/root.pem").read_bytes())

    def machine(self, name: str, image: Path, **options: Any) -> emulator.Machine:
        """A machine whose socket is `name`.sock, signing under the test authority."""
        options = {"signing_dir": self.directory / "authority", **options}
        files = (self.directory / f"{name}.sock", self.directory / f"{name}.log")
        return emulator.Machine(image, *files, **options)

    def dial(self, path: Path, port: int = PROBE_PORT) -> socket.socket:
        """Connect to an enclave's port the way its parent would, retrying while it boots."""
        deadline = time.monotonic() + BOOT_DEADLINE_S
        while time.monotonic() < deadline:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(30)
            try:
                connection.connect(str(path))
                connection.sendall(f"CONNECT {port}\n".encode())
                if connection.recv(64).startswith(b"OK "):
                    return connection
            except OSError:
                pass
            connection.close()
            time.sleep(0.5)
        raise TimeoutError(f"the enclave behind {path} did not answer")

    @contextmanager
    def answering(self, machine: emulator.Machine) -> Iterator[None]:
        """Run a machine with the probe in it, once more should the emulation hang as it boots."""
        for is_last in (False, True):
            with emulator.booted(machine, self.tools):
                try:
                    self.ask(machine.vsock, "describe")
                except TimeoutError:
                    if is_last:
                        raise
                    continue
                yield
                return

    def tap(self, listen: Address, target: Address) -> Tap:
        """A tap on its own threads; close it."""
        return Tap(listen, target)

    def ask(self, path: Path, op: str, **fields: Any) -> Any:
        """Put a question to the probe in the enclave behind `path`."""
        with self.dial(path) as connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            stream.flush()
            return json.loads(stream.readline())

    def attest(self, path: Path, *, nonce: bytes, user_data: bytes, public_key: bytes) -> bytes:
        """A document of the security module of the enclave behind `path`, the probe in it."""
        fields = {"nonce": nonce, "user_data": user_data, "public_key": public_key}
        asked = {name: value.hex() for name, value in fields.items()}
        return bytes.fromhex(self.ask(path, "attest", **asked))


@pytest.fixture(scope="session")
def boot() -> Boot:
    directory = os.environ.get("VEILPIPE_BOOT_TEST")
    if directory is None:
        pytest.skip("boots virtual machines: run scripts/test_enclave.sh")
    return Boot(Path(directory), Path(os.environ["VEILPIPE_CACHE"]) / "tools")


@pytest.fixture
def image() -> eif.Image:
    """Every measured kind of section, two ramdisks, and metadata."""
    return eif.Image(
        (
            eif.Section(eif.SectionType.KERNEL, b"kernel" * 7),
            eif.Section(eif.SectionType.CMDLINE, b"console=ttyS0"),
            eif.Section(eif.SectionType.RAMDISK, b"base system" * 5),
            eif.Section(eif.SectionType.RAMDISK, b"stage files" * 3),
            eif.Section(eif.SectionType.METADATA, b'{"ImageName":"test"}'),
        ),
        default_memory_bytes=1 << 30,
        default_cpus=2,
    )


@pytest.fixture(scope="session")
def signer() -> Callable[[ec.EllipticCurve], tuple[bytes, bytes]]:
    """Return (private key PEM, certificate PEM) for a curve."""

    @cache
    def make(curve_name: str) -> tuple[bytes, bytes]:
        curve = {"secp256r1": ec.SECP256R1, "secp384r1": ec.SECP384R1, "secp521r1": ec.SECP521R1}
        key = ec.generate_private_key(curve[curve_name]())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "image signer")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2036, 1, 1, tzinfo=UTC))
            .sign(key, hashes.SHA384())
        )
        encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        key_pem = key.private_bytes(encoding, private, serialization.NoEncryption())
        return key_pem, certificate.public_bytes(encoding)

    return lambda curve: make(curve.name)
