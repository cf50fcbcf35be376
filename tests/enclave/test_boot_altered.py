"""Images that differ in one byte boot like the pinned one, and the orchestrator refuses them.

A stage of this process answers the orchestrator; the security module it speaks for is the one of
the booted guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from enclave import eif
from pipeline.agreement.addresses import StageEndpoint, TcpAddress
from pipeline.agreement.identity import create_identity
from pipeline.agreement.manifest import Manifest
from pipeline.agreement.trust_policy import UserTrust
from pipeline.engine.limits import Limits
from pipeline.errors import SessionError
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.links import CONTROL_LIMITS, ControlLink
from pipeline.protocol.peer_connections import CONTROL_EPOCH, ORCHESTRATOR
from transport.attestation.evidence_binding import Binding, EvidenceKind, user_data
from transport.attestation.key_only import KeyOnlyVerifier
from transport.channel import accept_channel
from transport.dial_and_listen import Listener, TcpEndpoint, listen
from transport.errors import TransportError
from transport.handshake import Credentials, Link, LinkKind, Role, RoleKind


class GuestModule:
    """Evidence of the security module of the guest behind a socket; keeps the last document."""

    kind = EvidenceKind.NITRO

    def __init__(self, boot: Any, vsock: Path) -> None:
        self._boot = boot
        self._vsock = vsock
        self.document = b""

    def attest(self, binding: Binding) -> bytes:
        self.document = self._boot.attest(
            self._vsock,
            nonce=binding.nonce,
            user_data=user_data(binding),
            public_key=binding.static_key,
        )
        return self.document


class Replay:
    """Evidence that was right in an earlier handshake."""

    kind = EvidenceKind.NITRO

    def __init__(self, document: bytes) -> None:
        self._document = document

    def attest(self, binding: Binding) -> bytes:
        del binding
        return self._document


class Stage:
    """Stage 0 toward the user: answers the handshake, keeps the first message it is sent."""

    def __init__(self, boot: Any, directory: Path, model: Path, expected: dict[int, bytes]) -> None:
        self._boot = boot
        self._identity = directory / "identity.pem"
        self._user_key = create_identity(self._identity)
        self._static_key = X25519PrivateKey.generate()
        planned = plan(model, PlanOptions(1, orchestrator_keys=(self._user_key,)))
        pins = {index: value.hex() for index, value in expected.items()}
        self._stage = planned.stage(0).model_copy(update={"expected_measurements": pins})
        self._planned = planned
        self.messages: list[str] = []
        self.data_dials = 0

    async def meet(self, attester: GuestModule | Replay) -> str:
        """Let the user's orchestrator connect; returns how that failed."""
        with (
            listen(TcpEndpoint("127.0.0.1", 0)) as control,
            listen(TcpEndpoint("127.0.0.1", 0)) as data,
        ):
            manifest = self._manifest(control, data)
            trust = UserTrust.create(manifest, self._identity, self._boot.root)
            options = PipelineOptions(Limits(1, 64), data_out_listen=TcpEndpoint("127.0.0.1", 0))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._answer, control, manifest, attester)
                nursery.start_soon(self._count_dials, data)
                with pytest.raises(SessionError) as caught:
                    async with open_pipeline(manifest, trust, options, lambda line: None):
                        raise AssertionError("no stage computes here")
                nursery.cancel_scope.cancel()
        return str(caught.value)

    def _manifest(self, control: Listener, data: Listener) -> Manifest:
        at = [TcpAddress(type="tcp", addr=str(each.endpoint)) for each in (control, data)]
        endpoint = StageEndpoint(control=at[0], data_in=at[1], data_out=at[1])
        stage = self._stage.model_copy(update={"endpoint": endpoint})
        return self._planned.model_copy(update={"stages": (stage,)})

    async def _answer(
        self, control: Listener, manifest: Manifest, attester: GuestModule | Replay
    ) -> None:
        stage = Role(RoleKind.STAGE, 0)
        link = Link(LinkKind.CONTROL, ORCHESTRATOR, stage, manifest.core_hash(), CONTROL_EPOCH)
        verifier = KeyOnlyVerifier(frozenset({bytes.fromhex(self._user_key)}))
        credentials = Credentials(self._static_key, attester, (verifier,))
        try:
            channel = await accept_channel(
                await control.accept(), link, credentials, CONTROL_LIMITS
            )
        except TransportError:
            return
        self.messages.append((await ControlLink(channel).receive()).type)
        await channel.aclose()

    async def _count_dials(self, data: Listener) -> None:
        while True:
            (await data.accept()).close()
            self.data_dials += 1


def change_kernel(kernel: bytes) -> bytes:
    """Alter the text that names the version. Source: Linux Documentation/arch/x86/boot.rst."""
    at = int.from_bytes(kernel[0x20E:0x210], "little") + 0x200
    assert kernel[at : at + 2] == b"6."
    return kernel[:at] + b"7" + kernel[at + 1 :]


def change_cmdline(cmdline: bytes) -> bytes:
    assert b"panic=30" in cmdline
    return cmdline.replace(b"panic=30", b"panic=31")


def change_stage(ramdisk: bytes) -> bytes:
    text = b'"""Runs inside an enclave under test'
    assert ramdisk.count(text) == 1
    return ramdisk.replace(text, text.replace(b"R", b"r"))


CHANGES = {
    "kernel": (0, change_kernel, {0, 1}),
    "cmdline": (1, change_cmdline, {0, 1}),
    "stage": (-1, change_stage, {0, 2}),
}


@pytest.fixture(scope="module")
def genuine(boot: Any) -> eif.Image:
    """The pinned image: kernel, command line, three ramdisks."""
    image = eif.unpack((boot.directory / "probe.eif").read_bytes())
    kept = {eif.SectionType.KERNEL, eif.SectionType.CMDLINE, eif.SectionType.RAMDISK}
    return replace(image, sections=tuple(each for each in image.sections if each.type in kept))


@pytest.fixture
def stage(boot: Any, tmp_path: Path, tiny_model: Path, genuine: eif.Image) -> Stage:
    return Stage(boot, tmp_path, tiny_model, eif.measure(genuine))


def booted(boot: Any, image: eif.Image, name: str) -> Iterator[GuestModule]:
    path = boot.directory / f"{name}.eif"
    path.write_bytes(b"".join(eif.pack(image)))
    machine = boot.machine(name, path, memory_mib=1024)
    with boot.answering(machine):
        inside = boot.ask(machine.vsock, "registers")  # up, and measured as computed
        assert {i: inside[str(i)] for i in range(3)} == {
            i: value.hex() for i, value in eif.measure(image).items()
        }
        yield GuestModule(boot, machine.vsock)


@pytest.fixture(scope="module")
def genuine_module(boot: Any, genuine: eif.Image) -> Iterator[GuestModule]:
    yield from booted(boot, genuine, "genuine")


@pytest.fixture(params=CHANGES)
def altered(boot: Any, genuine: eif.Image, request: Any) -> Iterator[tuple[GuestModule, set[int]]]:
    at, change, registers = CHANGES[request.param]
    sections = list(genuine.sections)
    old = bytes(sections[at].data)
    new = change(old)
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 1
    sections[at] = eif.Section(sections[at].type, new)
    for module in booted(boot, replace(genuine, sections=tuple(sections)), request.param):
        yield module, registers


async def test_the_pinned_image_is_believed(stage: Stage, genuine_module: GuestModule) -> None:
    await stage.meet(genuine_module)
    assert stage.messages == ["init"]


async def test_one_changed_byte_is_refused_before_anything_is_said(
    stage: Stage, altered: tuple[GuestModule, set[int]]
) -> None:
    module, registers = altered
    refusal = await stage.meet(module)
    assert "pcrs: PCR " + ", ".join(map(str, sorted(registers))) in refusal
    assert stage.messages == []
    assert stage.data_dials == 0


async def test_a_document_of_an_earlier_handshake_is_refused(
    stage: Stage, genuine_module: GuestModule
) -> None:
    await stage.meet(genuine_module)
    assert stage.messages == ["init"]
    stage.data_dials = 0
    refusal = await stage.meet(Replay(genuine_module.document))
    assert "nonce" in refusal or "user_data" in refusal
    assert stage.messages == ["init"]
    assert stage.data_dials == 0
