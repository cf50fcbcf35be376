"""Nobody who does not authenticate keeps the right peer out, however many there are."""

import resource
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from pipeline.agreement.trust_policy import DevTrust
from pipeline.protocol import peer_connections
from pipeline.protocol.peer_connections import (
    CONTROL_EPOCH,
    ORCHESTRATOR,
    accept_all,
    accept_first,
    connect_retrying,
)
from pipeline.protocol.time_limits import DEFAULT_TIMES, TimeLimits
from transport.channel import connect_channel
from transport.dial_and_listen import TcpEndpoint, UnixEndpoint, dial, listen
from transport.errors import AttemptsSpent, EndpointError, HandshakeError, NoAnswer
from transport.handshake import Link, LinkKind, Role, RoleKind, initiate, with_length
from transport.pending_connections import PROOF_SECONDS
from transport.retries import RetryPolicy
from transport.tensor_frames import FrameLimits

LOOPBACK = TcpEndpoint("127.0.0.1", 0)
STAGE = Role(RoleKind.STAGE, 0)
LINK = Link(LinkKind.CONTROL, ORCHESTRATOR, STAGE, bytes(range(32)), CONTROL_EPOCH)
LIMITS = FrameLimits(1 << 10, 1, 1 << 10)
# Nobody's time is up before whoever hangs has been given up: only room can be made for the right.
HANG_SECONDS = 120
PATIENT = TimeLimits(handshake_seconds=10 * HANG_SECONDS)
CROWD = 200


@pytest.fixture
def trust(tmp_path):
    return DevTrust.create(tmp_path)


@pytest.fixture
def theirs(tmp_path, trust):
    """The right peer's."""
    return DevTrust.create(tmp_path)


@pytest.fixture(autouse=True)
def many_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def silence(trust):
    return b""


def a_byte(trust):
    return b"\0"


def all_but_a_byte(trust):
    return with_length(initiate(LINK, trust.toward(STAGE, {}))[1])[:-1]


def hello_for_another_link(trust):
    other = Link(LinkKind.CONTROL, ORCHESTRATOR, STAGE, bytes(32), CONTROL_EPOCH)
    return with_length(initiate(other, trust.toward(STAGE, {}))[1])


def right_hello(trust):
    return with_length(initiate(LINK, trust.toward(STAGE, {}))[1])


async def connect(trust, endpoint):
    credentials = trust.toward(STAGE, {})
    return await connect_channel(await dial(endpoint), LINK, credentials, LIMITS)


async def crowd(endpoint, trust, say, number, sockets):
    for _ in range(number):
        sock = await dial(endpoint)
        sockets.enter_context(sock)
        sock.send(say(trust))


@pytest.mark.parametrize(
    "say", [silence, a_byte, all_but_a_byte, hello_for_another_link, right_hello]
)
async def test_no_crowd_of_strangers_keeps_the_right_peer_out(trust, theirs, say):
    with listen(LOOPBACK) as listener, ExitStack() as strangers:
        async with trio.open_nursery() as nursery:
            accepted = []

            async def accept():
                accepted.append(await accept_first(listener, LINK, trust, {}, LIMITS, PATIENT))

            nursery.start_soon(accept)
            await crowd(listener.endpoint, trust, say, CROWD, strangers)
            with trio.fail_after(HANG_SECONDS):
                near = await connect(theirs, listener.endpoint)
        assert near.handshake_hash == accepted[0].handshake_hash
        await near.aclose()
        await accepted[0].aclose()


async def test_a_stranger_has_as_long_as_it_is_given(trust):
    times = TimeLimits(handshake_seconds=0.05)
    with listen(LOOPBACK) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_first, listener, LINK, trust, {}, LIMITS, times)
            stream = trio.SocketStream(
                trio.socket.from_stdlib_socket(await dial(listener.endpoint))
            )
            async with stream:
                assert await stream.receive_some() == b""
            nursery.cancel_scope.cancel()


async def test_who_is_silent_is_named_with_the_time_it_had(theirs):
    times = TimeLimits(handshake_seconds=0.05)
    with listen(LOOPBACK) as listener, pytest.raises(trio.TooSlowError) as caught:
        await connect_retrying(
            lambda: listener.endpoint, LINK, theirs.toward(STAGE, {}), LIMITS, lambda _: None,
            times=times,
        )  # fmt: skip
    assert peer_connections.describe(caught.value) == "the peer was silent for 0.05 s"


async def test_dials_that_are_refused_and_answers_of_a_relay_are_attempts_alike(theirs, tmp_path):
    """A relay that hangs up at once, then no relay."""
    waits = []
    places = [listen(UnixEndpoint(tmp_path / "relay"))]

    async def hang_up():
        (await places[0].accept()).close()
        places[0].close()

    times = TimeLimits(retry=RetryPolicy(attempts=3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        with pytest.raises(AttemptsSpent, match="attempts made: 3"):
            await connect_retrying(
                lambda: UnixEndpoint(tmp_path / "relay"), LINK, theirs.toward(STAGE, {}), LIMITS,
                waits.append, times=times,
            )  # fmt: skip
    assert [type(each) for each in waits] == [NoAnswer, EndpointError, EndpointError]


def test_a_relay_waits_for_as_long_as_a_handshake_may_take():
    assert DEFAULT_TIMES.handshake_seconds <= PROOF_SECONDS


async def test_a_crowd_that_keeps_coming_keeps_nobody_out(trust, theirs):
    num_met = 0

    async def welcome(channel):
        nonlocal num_met
        num_met += 1
        await channel.aclose()

    with listen(LOOPBACK) as listener, ExitStack() as strangers:
        async with trio.open_nursery() as nursery:
            credentials = trust.toward(ORCHESTRATOR, {})
            nursery.start_soon(accept_all, listener, LINK, credentials, LIMITS, welcome, PATIENT)
            nursery.start_soon(crowd, listener.endpoint, trust, silence, 1000, strangers)
            for _ in range(20):
                with trio.fail_after(HANG_SECONDS):
                    near = await connect(theirs, listener.endpoint)
                await near.aclose()
            nursery.cancel_scope.cancel()
    assert num_met == 20


async def test_handshakes_under_way_are_bounded(trust):
    def num_sockets():
        return sum(each.is_socket() for each in Path("/proc/self/fd").iterdir())

    async def welcome(channel):
        pytest.fail("a stranger authenticated")

    with listen(LOOPBACK) as listener, ExitStack() as strangers:
        before = num_sockets()
        async with trio.open_nursery() as nursery:
            credentials = trust.toward(ORCHESTRATOR, {})
            nursery.start_soon(accept_all, listener, LINK, credentials, LIMITS, welcome, PATIENT)
            await crowd(listener.endpoint, trust, silence, CROWD, strangers)
            with trio.fail_after(HANG_SECONDS):
                while num_sockets() - before - CROWD > peer_connections.MAX_PENDING_HANDSHAKES:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_a_hello_seen_on_its_way_is_shown_evidence_once(trust):
    documents = []

    class Attester:
        kind = trust.attester.kind

        def attest(self, binding):
            documents.append(trust.attester.attest(binding))
            return documents[-1]

    async def answer_to(endpoint, hello):
        sock = trio.SocketStream(trio.socket.from_stdlib_socket(await dial(endpoint)))
        async with sock:
            await sock.send_all(hello)
            return await sock.receive_some()

    async def welcome(channel):
        pytest.fail("a replayed hello authenticated")

    credentials = DevTrust(trust.static_key, Attester(), trust.verifier).toward(ORCHESTRATOR, {})
    with listen(LOOPBACK) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_all, listener, LINK, credentials, LIMITS, welcome)
            hello = right_hello(trust)
            answers = [await answer_to(listener.endpoint, hello) for _ in range(5)]
            nursery.cancel_scope.cancel()
    assert len(answers[0]) > 100
    assert answers[1:] == [b"\0\0"] * 4
    assert len(documents) == 1


async def test_one_that_had_to_make_room_tries_again_until_it_is_met(trust, theirs, monkeypatch):
    monkeypatch.setattr(peer_connections, "NO_ANSWER_SECONDS", 0.01)
    waits = []

    async def serve(listener):
        (await listener.accept()).close()  # as if it had lost its place
        channel = await accept_first(listener, LINK, trust, {}, LIMITS)
        await channel.aclose()

    with listen(LOOPBACK) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, listener)
            credentials = theirs.toward(STAGE, {})
            channel = await connect_retrying(
                lambda: listener.endpoint, LINK, credentials, LIMITS, waits.append
            )
            await channel.aclose()
    assert [type(each) for each in waits] == [NoAnswer]


async def test_a_peer_with_another_manifest_is_told_so_at_once_and_does_not_retry(trust, theirs):
    other = Link(LinkKind.CONTROL, ORCHESTRATOR, STAGE, bytes(32), CONTROL_EPOCH)
    with listen(LOOPBACK) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_first, listener, LINK, trust, {}, LIMITS)
            credentials = theirs.toward(STAGE, {})
            with (
                trio.fail_after(HANG_SECONDS),
                pytest.raises(HandshakeError, match="another manifest"),
            ):
                await connect_retrying(
                    lambda: listener.endpoint, other, credentials, LIMITS, lambda _: None
                )
            nursery.cancel_scope.cancel()


async def test_a_flood_of_refusals_does_not_flood_the_log(trust, theirs, caplog):
    async def welcome(channel):
        await channel.aclose()

    with listen(LOOPBACK) as listener, ExitStack() as strangers:
        async with trio.open_nursery() as nursery:
            credentials = trust.toward(ORCHESTRATOR, {})
            nursery.start_soon(accept_all, listener, LINK, credentials, LIMITS, welcome, PATIENT)
            await crowd(listener.endpoint, trust, hello_for_another_link, CROWD, strangers)
            with trio.fail_after(HANG_SECONDS):
                channel = await connect(theirs, listener.endpoint)
            await channel.aclose()
            nursery.cancel_scope.cancel()
    assert 1 <= caplog.text.count("event=handshake_refused") <= 5


def test_refusals_left_out_are_counted_in_the_next_line(caplog, autojump_clock):
    async def refuse():
        refusals = peer_connections.Refusals()
        for _ in range(10):
            refusals.report(LINK, "no")
        await trio.sleep(peer_connections.REFUSAL_SECONDS)
        refusals.report(LINK, "no more")

    trio.run(refuse, clock=autojump_clock)
    assert [record.args[1] for record in caplog.records] == [0, 9]


@pytest.mark.parametrize("num_reasons", [1, 2])
def test_reasons_that_come_again_and_again_are_said_once_a_minute(
    caplog, autojump_clock, num_reasons
):
    async def refuse():
        refusals = peer_connections.Refusals()
        for count in range(600):  # over ten minutes
            refusals.report(LINK, f"another manifest {count % num_reasons}")
            await trio.sleep(1.0)

    trio.run(refuse, clock=autojump_clock)
    assert len(caplog.records) == 10 * num_reasons
