"""Places are bounded, always to be had, and lost first by those who crowd and say nothing."""

import socket
from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from transport import pending_connections as lobby_module
from transport.errors import HandshakeError
from transport.pending_connections import (
    PROOF_SECONDS,
    Guest,
    HelloMemory,
    Lobby,
    Standing,
    source_of,
)


def is_out(guest):
    return guest.scope.cancel_called


async def test_the_longest_silent_makes_room():
    lobby = Lobby(3)
    guests = [lobby.enter("one") for _ in range(3)]
    guests[0].standing = Standing.HEARD
    assert lobby.enter("one") is not None
    assert [is_out(guest) for guest in guests] == [False, True, False]
    assert len(lobby) == 3


async def test_who_has_spoken_makes_room_where_nobody_is_silent():
    lobby = Lobby(2)
    first, second = (lobby.enter("one") for _ in range(2))
    first.standing = second.standing = Standing.HEARD
    lobby.enter("one")
    assert is_out(first)
    assert not is_out(second)


async def test_those_who_have_spoken_leave_a_newcomer_the_time_to_speak():
    lobby = Lobby(8)
    for _ in range(8):
        lobby.enter("one").standing = Standing.HEARD
    newcomers = [lobby.enter("one") for _ in range(4)]
    assert not any(is_out(guest) for guest in newcomers)
    lobby.enter("one")
    assert [is_out(guest) for guest in newcomers] == [True, False, False, False]


async def test_a_crowd_of_one_source_costs_no_other_its_place():
    lobby = Lobby(4)
    right = lobby.enter("elsewhere")
    crowd = []
    for _ in range(50):
        crowd.append(lobby.enter("crowd"))
        crowd[-1].standing = Standing.HEARD
    assert not is_out(right)
    assert len(lobby) == 4


async def test_whose_answer_has_stood_makes_room_for_nobody(autojump_clock):
    lobby = Lobby(3)
    guests = [lobby.enter("one") for _ in range(3)]
    for guest in guests:
        guest.answer()
    await trio.sleep(PROOF_SECONDS)
    assert lobby.enter("other") is None
    guests[1].standing = Standing.HEARD  # whoever answered has left it
    assert lobby.enter("other") is not None
    assert [is_out(guest) for guest in guests] == [False, True, False]


async def test_one_source_that_has_itself_answered_keeps_no_other_out(autojump_clock):
    lobby = Lobby(8)
    crowd = [lobby.enter("crowd") for _ in range(8)]
    for guest in crowd:
        guest.answer()
    right = [lobby.enter(source) for source in ("this", "that", "this")]
    for _ in range(50):  # and comes again for each place it has lost, but has no more to gain
        if again := lobby.enter("crowd"):
            again.answer()
    assert all(right)
    assert not any(is_out(guest) for guest in right)
    for guest in right:
        guest.answer()
    await trio.sleep(PROOF_SECONDS / 2)
    for _ in range(50):
        lobby.enter("crowd")
    assert not any(is_out(guest) for guest in right)


async def test_the_answered_lose_no_place_to_any_number_that_cannot_have_themselves_answered():
    lobby = Lobby(8)
    right = [lobby.enter("right") for _ in range(4)]
    for guest in right:
        guest.answer()
    for number in range(100):  # each from elsewhere
        lobby.enter(number).standing = Standing(number % 2)
    assert not any(is_out(guest) for guest in right)


async def test_a_source_loses_nothing_to_itself_that_has_been_answered():
    lobby = Lobby(4)
    answered = [lobby.enter("one") for _ in range(4)]
    for guest in answered:
        guest.answer()
    assert lobby.enter("one") is None
    assert not any(is_out(guest) for guest in answered)


async def test_a_place_is_free_again_once_left():
    lobby = Lobby(1)
    guest = lobby.enter("one")
    lobby.leave(guest)
    lobby.leave(guest)
    assert lobby.enter("other") is not None
    assert not is_out(guest)


@given(
    moves=st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(Standing), st.sampled_from([0, 0, PROOF_SECONDS])
        )
    ),
    num_places=st.integers(1, 5),
)
def test_whatever_comes_places_are_bounded_and_the_established_keep_theirs(moves, num_places):
    clock = trio.testing.MockClock(autojump_threshold=0)
    trio.run(check_moves, moves, num_places, clock=clock)


async def check_moves(moves, num_places):
    lobby = Lobby(num_places)
    inside: list[Guest] = []
    for source, standing, seconds in moves:
        established = [each for each in inside if each.is_established]
        guest = lobby.enter(source)
        assert not any(is_out(each) for each in established)
        inside = [each for each in inside if not is_out(each)]
        if guest is None:
            unproven = Counter(each.source for each in inside if not each.is_established)
            assert len(inside) == num_places
            assert all(num == 1 or other == source for other, num in unproven.items())
        elif standing is Standing.ANSWERED:
            guest.answer()
        else:
            guest.standing = standing
        if guest is not None:
            inside.append(guest)
        if seconds and inside:
            await trio.sleep(seconds)
            lobby.leave(inside.pop(0))
        assert len(lobby) == len(inside) <= num_places
    assert not any(is_out(each) for each in inside)


def test_a_hello_heard_before_is_refused_and_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(lobby_module, "MAX_HELLOS", 3)
    memory = HelloMemory()
    for key in (b"1", b"2", b"3"):
        memory.add(key)
    with pytest.raises(HandshakeError, match="replayed"):
        memory.add(b"1")
    memory.add(b"4")
    memory.add(b"1")  # forgotten for the fourth
    assert len(memory._heard) == 3


@pytest.mark.parametrize(
    ("family", "address", "source"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET6, "::1", bytes(8)),
    ],
)
def test_a_source_is_a_machine_and_not_a_port(family, address, source):
    with socket.create_server((address, 0), family=family) as listener:
        dialed = [socket.create_connection(listener.getsockname()[:2]) for _ in range(2)]
        accepted = [listener.accept()[0] for _ in range(2)]
        assert [source_of(sock) for sock in accepted] == [source, source]
        for sock in dialed + accepted:
            sock.close()


def test_all_of_an_ipv6_network_is_one_source():
    class Far:
        family = socket.AF_INET6

        def __init__(self, address):
            self.address = address

        def getpeername(self):
            return self.address, 1, 0, 0

    assert source_of(Far("2001:db8:0:1::1")) == source_of(Far("2001:db8:0:1:ff::2"))
    assert source_of(Far("2001:db8:0:1::1")) != source_of(Far("2001:db8:0:2::1"))
    assert source_of(Far("fe80::1%eth0")) == source_of(Far("fe80::2%eth0"))


def test_one_that_has_gone_or_has_no_address_has_no_source():
    near, far = socket.socketpair()
    assert source_of(near) is None
    near.close()
    far.close()
    assert source_of(near) is None


async def test_an_evicted_guest_ends_where_it_waits():
    lobby = Lobby(1)
    guest = lobby.enter("one")

    async def stay():
        with guest.scope:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stay)
        await trio.testing.wait_all_tasks_blocked()
        lobby.enter("other")
    assert guest.scope.cancelled_caught
