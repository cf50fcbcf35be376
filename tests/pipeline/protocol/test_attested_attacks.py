"""A malicious relay against an attested pipeline: whatever it does, it is noticed, and first.

Every channel of the pipeline shows attestation documents in its handshake. The relay knows where
handshake messages and records begin, and may do with them as it likes.
"""

from functools import partial
from inspect import isawaitable

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.errors import SessionError
from pipeline.protocol.links import CONTROL_LIMITS
from pipeline.protocol.peer_connections import CONTROL_EPOCH, ORCHESTRATOR
from transport.attestation.evidence_binding import EvidenceKind
from transport.attestation.key_only import KeyOnlyAttester
from transport.channel import connect_channel
from transport.dial_and_listen import dial
from transport.errors import AttestationError
from transport.handshake import Credentials, Link, LinkKind, Role, RoleKind

TO_TARGET, FROM_TARGET = "to target", "from target"
NUM_HANDSHAKE_UNITS = {TO_TARGET: 2, FROM_TARGET: 1}
# Data travels to the target on all of these.
DATA_LINKS = ["data0", "data1", "results"]
NUM_TOKENS = 12
FIRST_MESSAGE = 2  # from the target: its handshake message, its acceptance, then this
AT = 4  # the record attacked, counted from the handshake's end: some way into the generation


class Malicious:
    """Carries whole handshake messages and records; those of one link pass through `tamper`.

    `tamper(direction, number, unit)` returns the units to send in place of number `number`, counted
    per direction; None among them ends the stream there. `units` keeps all that came, by link.
    """

    def __init__(self, read_unit, link, tamper):
        self._read_unit = read_unit
        self.link = link
        self.tamper = tamper
        self.instead = {}
        self.num_tampered = self.num_rerouted = 0
        self.units = {}
        self._targets = {}

    @property
    def prompt_records(self):
        """How many records went to the first stage's data channel, where prompts go."""
        return len(self.units.get(("data0", TO_TARGET), [])[NUM_HANDSHAKE_UNITS[TO_TARGET] :])

    async def serve(self, name, listener, target):
        self._targets[name] = target
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._bridge, name, await listener.accept(), target)

    async def _bridge(self, name, incoming, target):
        if name in self.instead:
            target = self._targets[self.instead[name]]
            self.num_rerouted += 1
        async with trio.SocketStream(trio.socket.from_stdlib_socket(incoming)) as near:
            far = trio.SocketStream(trio.socket.from_stdlib_socket(await dial(target)))
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, name, TO_TARGET, near, far)
                nursery.start_soon(self._forward, name, FROM_TARGET, far, near)

    async def _forward(self, name, direction, source, sink):
        number = 0
        try:
            while True:
                is_handshake = number < NUM_HANDSHAKE_UNITS[direction]
                unit = await self._read_unit(source, is_handshake=is_handshake)
                if unit is None:
                    break
                self.units.setdefault((name, direction), []).append(unit)
                sent = [unit]
                if name == self.link:
                    sent = self.tamper(direction, number, unit)
                    if isawaitable(sent):
                        sent = await sent
                    self.num_tampered += sent != [unit]
                for each in sent:
                    if each is None:
                        return await sink.send_eof()
                    await sink.send_all(each)
                number += 1
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@pytest.fixture
def malicious(deployment, read_unit):
    """Puts a malicious relay between all of a deployment."""

    def put(link=None, tamper=None):
        deployment.tap = Malicious(read_unit, link, tamper)
        return deployment.tap

    return put


def on_record(action, at=AT):
    """Do something to one record on its way to the target."""

    def tamper(direction, number, unit):
        if direction == TO_TARGET and number == NUM_HANDSHAKE_UNITS[direction] + at:
            return action(unit)
        return [unit]

    return tamper


def reordered(direction, number, unit, held):
    """The first record after the second: a prompt's chunks are sent without waiting."""
    first = NUM_HANDSHAKE_UNITS[TO_TARGET]
    if direction != TO_TARGET or number not in (first, first + 1):
        return [unit]
    held.append(unit)
    return [] if number == first else held[::-1]


def flip(position):
    def action(unit):
        altered = bytearray(unit)
        altered[position] ^= 1
        return [bytes(altered), bytes(64)]  # so that a longer declared record completes, too

    return action


RECORD_ATTACKS = {
    "drop": lambda: on_record(lambda unit: [], at=0),
    "reorder": lambda: partial(reordered, held=[]),
    "replay": lambda: on_record(lambda unit: [unit, unit]),
    "truncate": lambda: on_record(lambda unit: [None]),
    "truncate inside": lambda: on_record(lambda unit: [unit[:-3], None]),
    "flip in a header": lambda: on_record(flip(0)),
    "flip in a length": lambda: on_record(flip(7)),
    "flip in a body": lambda: on_record(flip(20)),
    "flip in a tag": lambda: on_record(flip(-1)),
}


@pytest.fixture
def unexplained(monkeypatch):
    """A broken link ends the work at once: nobody waits for word of a stage that may have died."""
    monkeypatch.setattr("pipeline.orchestrator.loss_record.BLAME_SECONDS", 0)


async def expect_refusal(deployment, *words):
    """The session fails, and no further than with the first words of the truth."""
    async with deployment.running() as (manifest, results):
        with pytest.raises(SessionError) as caught:
            await deployment.generate(manifest, results, NUM_TOKENS)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.usefixtures("unexplained")
@pytest.mark.parametrize("link", DATA_LINKS)
@pytest.mark.parametrize("attack", RECORD_ATTACKS)
async def test_what_happens_to_a_record_is_noticed(deployment, malicious, link, attack):
    malicious(link, RECORD_ATTACKS[attack]())
    await expect_refusal(deployment)
    assert deployment.tap.num_tampered > 0


async def test_a_delay_changes_nothing_but_the_time(deployment, malicious):
    async def wait(direction, number, unit):
        await trio.sleep(0.02)
        return [unit]

    malicious("data1", wait)
    async with deployment.running() as (manifest, results):
        tokens = await deployment.generate(manifest, results, NUM_TOKENS)
    assert tokens == deployment.reference(NUM_TOKENS)


async def test_a_message_reflected_to_its_sender_is_noticed(deployment, malicious):
    tap = malicious("control0")

    def reflect(direction, number, unit):
        if direction == FROM_TARGET and number == FIRST_MESSAGE:
            return [tap.units["control0", TO_TARGET][NUM_HANDSHAKE_UNITS[TO_TARGET]]]
        return [unit]

    tap.tamper = reflect
    await expect_refusal(deployment, "stage 0")
    assert tap.num_tampered == 1


@pytest.mark.usefixtures("unexplained")
@pytest.mark.parametrize("link", DATA_LINKS)
async def test_a_record_spliced_in_from_another_channel_is_noticed(deployment, malicious, link):
    """Its neighbour's record of the same step, or on the first link the control channel's."""
    tap = malicious(link)
    other = {"data0": "control0", "data1": "data0", "results": "data1"}[link]
    first = NUM_HANDSHAKE_UNITS[TO_TARGET]
    tap.tamper = on_record(lambda unit: [tap.units[other, TO_TARGET][first]], at=0)
    await expect_refusal(deployment)
    assert tap.num_tampered == 1


@pytest.mark.usefixtures("unexplained")
@pytest.mark.parametrize("link", ["control0", "control1", *DATA_LINKS])
async def test_a_session_replayed_in_place_of_the_next_one_is_noticed(deployment, malicious, link):
    """The same parties, manifest and roles; another epoch on data channels, other keys on all."""
    tap = malicious()
    async with deployment.running() as (manifest, results):
        await deployment.generate(manifest, results, NUM_TOKENS)
        recorded = {d: list(tap.units[link, d]) for d in (TO_TARGET, FROM_TARGET)}
        tap.link = link
        tap.tamper = lambda direction, number, unit: recorded[direction][number : number + 1]
        with pytest.raises(SessionError):
            await deployment.generate(manifest, results, NUM_TOKENS)
    assert tap.num_tampered > 0


@pytest.mark.usefixtures("unexplained")
@pytest.mark.parametrize(
    ("link", "instead"),
    [("control0", "control1"), ("control1", "control0"), ("data0", "data1"), ("data1", "data0")],
)
async def test_the_channel_of_another_stage_is_refused(deployment, malicious, link, instead):
    malicious()
    deployment.tap.instead = {link: instead}
    await expect_refusal(deployment)
    assert (deployment.tap.num_rerouted, deployment.tap.prompt_records) == (1, 0)


async def test_another_manifest_is_refused(deployment, malicious):
    """The user was sent a manifest whose core is not the one in the images."""
    malicious()
    deployment.pinned = deployment.pinned.model_copy(update={"model_version": "2"})
    await expect_refusal(deployment, "stage")
    assert deployment.tap.prompt_records == 0


class Replay:
    """A security module's documents, each one handshake late."""

    kind = EvidenceKind.NITRO

    def __init__(self, genuine):
        self._genuine = genuine
        self._last = None

    def attest(self, binding):
        fresh = self._genuine.attest(binding)
        shown, self._last = self._last or fresh, fresh
        return shown


async def test_a_document_of_an_earlier_handshake_is_refused(deployment, malicious):
    deployment.attesters[0] = Replay(deployment.module(0))
    malicious()
    # The first handshake of the stage shows a fresh document; its data channels show old ones.
    await expect_refusal(deployment, "not bound to this handshake")
    assert deployment.tap.prompt_records == 0


async def test_a_document_got_by_asking_the_genuine_stage_is_refused(deployment, malicious):
    """Diversion: a stage shows its document to whoever dials; it serves nobody else."""
    shown = []

    class Keep:
        kind = EvidenceKind.NITRO

        def verify(self, evidence, binding):
            shown.append(evidence)
            raise AttestationError("kept", "enough seen")

    async with deployment.running() as (manifest, _):
        stage = Role(RoleKind.STAGE, 0)
        link = Link(LinkKind.CONTROL, ORCHESTRATOR, stage, manifest.core_hash(), CONTROL_EPOCH)
        at = manifest.endpoint(0).control.to_endpoint()
        credentials = Credentials(X25519PrivateKey.generate(), KeyOnlyAttester(), (Keep(),))
        with pytest.raises(AttestationError, match="enough seen"):
            await connect_channel(await dial(at), link, credentials, CONTROL_LIMITS)

    class Diverted:
        kind = EvidenceKind.NITRO

        def attest(self, binding):
            return shown[0]

    deployment.attesters[0] = Diverted()
    deployment.keys[0] = X25519PrivateKey.generate()
    malicious()
    await expect_refusal(deployment, "stage 0")
    assert deployment.tap.prompt_records == 0
