"""Connections that a relay refuses, crowds out or cuts."""

import socket
from contextlib import ExitStack, suppress

import pytest
import trio

from tests.transport.relayed import LOOPBACK, converse, receive, until
from transport import relay as relay_module
from transport.dial_and_listen import dial, listen


async def test_connection_over_the_limit_is_closed_and_a_freed_place_taken(running, caplog):
    relayed = running(max_connections=1)
    near, far = await relayed.connect()
    await converse(near, far)
    with await dial(relayed.endpoint) as refused:
        assert await receive(refused) == b""
    assert relayed.stats.refused_over_limit == 1
    assert "refused map=" in caplog.text
    near.close()
    far.close()
    await until(lambda: relayed.stats.active == 0)
    near, far = await relayed.connect()
    near.close()
    far.close()
    assert relayed.stats.accepted == 2


@pytest.mark.parametrize("said", [b"", b"x"])
async def test_a_crowd_without_an_answer_makes_room_for_whoever_comes(running, said):
    relayed = running(max_connections=4)
    kept_near, kept_far = await relayed.connect()
    with ExitStack() as sockets:
        sockets.enter_context(kept_near)
        sockets.enter_context(kept_far)
        await converse(kept_near, kept_far)
        for _ in range(12):
            sockets.enter_context(await dial(relayed.endpoint)).send(said)
        near = sockets.enter_context(await dial(relayed.endpoint))
        near.send(b"right")

        async def answer(far):
            with suppress(ConnectionResetError):
                if await receive(far, 5) == b"right":
                    far.send(b"!")

        async def answer_all():
            while True:
                far = sockets.enter_context(await relayed.target.accept())
                nursery.start_soon(answer, far)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_all)
            with trio.fail_after(60):
                assert await receive(near, 1) == b"!"
            nursery.cancel_scope.cancel()
        await converse(kept_near, kept_far)
        assert relayed.stats.active <= 4
        assert relayed.stats.crowded_out >= 9
        assert relayed.stats.refused_over_limit == 0


async def answer_all(target, nursery):
    """Say again whatever is said, as long as anybody is there."""

    async def answer(far):
        with far, suppress(ConnectionResetError, BrokenPipeError):
            while said := await receive(far, 1):
                far.send(said)

    while True:
        nursery.start_soon(answer, await target.accept())


async def come_again(endpoint):
    """Have oneself answered and stay; when the place is another's, come for the next at once."""
    address, elsewhere = (endpoint.host, endpoint.port), ("127.0.0.2", 0)
    while True:
        near = socket.create_connection(address, source_address=elsewhere)
        with near, suppress(ConnectionResetError, BrokenPipeError):
            near.setblocking(False)
            near.send(b"1")
            while await receive(near, 1):
                pass
        await trio.lowlevel.checkpoint()


async def test_one_source_that_is_answered_and_comes_again_keeps_no_other_out(running):
    relayed = running(max_connections=8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, relayed.target, nursery)
        for _ in range(8):
            nursery.start_soon(come_again, relayed.endpoint)
        for _ in range(10):
            await until(lambda: relayed.stats.active == 8)
            await trio.sleep(0.05)  # and all of them are answered
            with await dial(relayed.endpoint) as near:
                for _ in range(3):
                    near.send(b"?")
                    assert await receive(near, 1) == b"?"
                    await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_a_connection_on_which_nobody_speaks_is_cut(running, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(relay_module, "SILENT_DEADLINE_S", 0.05)
    relayed = running()
    near, far = await relayed.connect()
    with near, far, trio.fail_after(60):
        assert await receive(near) == b""
        assert await receive(far) == b""
        await until(lambda: relayed.stats.active == 0)
    assert "reason=silent" in caplog.text


@pytest.mark.parametrize("is_dialer_first", [True, False])
async def test_a_connection_that_has_spoken_may_be_silent_for_as_long_as_it_likes(
    running, mock_clock, passing_time, monkeypatch, is_dialer_first
):
    monkeypatch.setattr(relay_module, "SILENT_DEADLINE_S", 1.0)
    monkeypatch.setattr(relay_module, "ORPHANED_DEADLINE_S", 0.05)
    relayed = running()
    near, far = await relayed.connect()
    first, second = (near, far) if is_dialer_first else (far, near)
    with near, far:
        first.send(b"?")
        assert await receive(second, 1) == b"?"
        await trio.sleep(1.1)
        second.send(b"!")
        assert await receive(first, 1) == b"!"
        await trio.sleep(0.2)
        near.shutdown(socket.SHUT_WR)  # a caller who has said all may still wait for the answer
        assert await receive(far) == b""
        await trio.sleep(0.2)
        far.send(b"late")
        assert await receive(near, 4) == b"late"


async def test_a_caller_who_stays_after_the_target_has_ended_is_cut(
    running, mock_clock, passing_time, monkeypatch
):
    monkeypatch.setattr(relay_module, "ORPHANED_DEADLINE_S", 1.0)
    relayed = running()
    near, far = await relayed.connect()
    with near, far, trio.fail_after(60):
        await converse(near, far)
        far.shutdown(socket.SHUT_WR)
        assert await receive(near) == b""
        for _ in range(3):  # what the caller still has to say may follow
            await trio.sleep(0.4)
            near.send(b"x")
            assert await receive(far, 1) == b"x"
        assert await receive(far) == b""
        await until(lambda: relayed.stats.active == 0)


def test_a_peer_that_vanished_is_noticed_within_minutes():
    with socket.socket() as sock:
        relay_module._keep_alive(LOOPBACK, sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        idle, interval, count = (
            sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in options
        )
        assert idle + interval * count <= 180


async def test_unreachable_target_closes_the_caller_with_one_line(running, caplog):
    relayed = running()
    relayed.target.close()
    with await dial(relayed.endpoint) as near:
        assert await receive(near) == b""
    assert relayed.stats.failed_dials == 1
    assert relayed.stats.active == 0
    assert caplog.text.count("\n") == 1
    assert "start the listener first" in caplog.text


async def test_a_target_that_is_away_for_long_is_said_once_a_minute_and_is_met_when_back(
    running, monkeypatch, caplog
):
    monkeypatch.setattr(relay_module, "AWAY_REMINDER_S", 0.5)
    relayed = running()
    target = relayed.target.endpoint
    relayed.target.close()
    began = trio.current_time()
    while relayed.stats.failed_dials <= 10 or caplog.text.count("dial failed") < 3:
        with await dial(relayed.endpoint) as near:
            assert await receive(near) == b""
    told = caplog.text.count("dial failed")
    assert told <= 1 + (trio.current_time() - began) / 0.5
    for count in (told + 1, told + 2):  # whatever was said before
        with (
            listen(target) as back,
            await dial(relayed.endpoint) as near,
            await back.accept() as far,
        ):
            await converse(near, far)
        with await dial(relayed.endpoint) as near:
            assert await receive(near) == b""
        assert caplog.text.count("dial failed") == count


async def test_target_that_never_answers_is_given_up(running, monkeypatch, caplog):
    async def never(_):
        await trio.sleep_forever()

    monkeypatch.setattr(relay_module, "dial", never)
    monkeypatch.setattr(relay_module, "DIAL_DEADLINE_S", 0.05)
    relayed = running()
    with await dial(relayed.endpoint) as near:
        assert await receive(near) == b""
    assert "no answer" in caplog.text
