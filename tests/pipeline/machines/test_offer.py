"""Pairing: whoever has the line first, once, for a while, and with a person's consent."""

import pytest
import trio

from pipeline.agreement.identity import ORCHESTRATOR_KEY, own_identity
from pipeline.errors import SessionError
from pipeline.machines import offer as offers
from pipeline.machines.known_homes import KnownHomes
from pipeline.machines.offer import OfferState
from pipeline.machines.offer_line import OfferLine
from pipeline.machines.visitor import pairing, visiting
from tests.pipeline.machines.conftest import SOFTWARE


async def yes(_):
    return True


async def join(rig, line, software=SOFTWARE, own=None):
    with trio.fail_after(120):
        async with pairing(line, own or rig.home) as visit:
            await visit.join(software)


async def test_whoever_has_the_line_is_known_from_then_on(rig):
    asked = []

    async def ask(home):
        asked.append(home)
        return True

    async with rig.machine("a", offers=ask, knows_home=False) as machine:
        await join(rig, machine.line)
        assert await machine.offer.wait() is OfferState.USED
        async with visiting(machine.address, rig.home) as visit:
            assert (await visit.describe(64)).software == SOFTWARE
    assert asked == [rig.home_key]
    known = rig.directory / "a" / "homes"
    assert KnownHomes(rig.directory / "a").keys() == (rig.home_key,)
    assert known.stat().st_mode & 0o777 == 0o600


async def test_a_line_is_worth_nothing_a_second_time_and_says_who_used_it(rig):
    other = own_identity(rig.directory / "other", ORCHESTRATOR_KEY)
    async with rig.machine("a", offers=yes, knows_home=False) as machine:
        await join(rig, machine.line)
        with pytest.raises(SessionError, match="used already, by SHA256:") as caught:
            await join(rig, machine.line, own=other)
        assert "\n" not in str(caught.value)
        with pytest.raises(SessionError, match="does not know this home"):
            async with visiting(machine.address, other):
                pass
        assert machine.homes == {rig.home_key}


async def test_a_line_grows_old(rig, monkeypatch):
    monkeypatch.setattr(offers, "OFFER_SECONDS", 0.05)
    async with rig.machine("a", offers=yes, knows_home=False) as machine:
        assert await machine.offer.wait() is OfferState.EXPIRED
        with pytest.raises(SessionError, match="older than ten minutes"):
            await join(rig, machine.line)
        assert not machine.homes


async def test_who_is_declined_is_not_known_and_neither_is_the_next(rig):
    async def no(_):
        return False

    async with rig.machine("a", offers=no, knows_home=False) as machine:
        for _ in range(2):
            with pytest.raises(SessionError, match="declined"):
                await join(rig, machine.line)
        assert not machine.homes


async def test_while_one_is_asked_about_another_has_to_go(rig):
    is_asked, decision = trio.Event(), trio.Event()
    other = own_identity(rig.directory / "other", ORCHESTRATOR_KEY)

    async def ask(_):
        is_asked.set()
        await decision.wait()
        return True

    async with rig.machine("a", offers=ask, knows_home=False) as machine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(join, rig, machine.line)
            await is_asked.wait()
            with pytest.raises(SessionError, match="somebody else is asking"):
                await join(rig, machine.line, own=other)
            decision.set()
        assert machine.homes == {rig.home_key}


async def test_the_line_of_another_machine_opens_none(rig):
    async with (
        rig.machine("a", offers=yes, knows_home=False) as first,
        rig.machine("b", offers=yes, knows_home=False) as second,
    ):
        mixed = OfferLine(first.line.endpoint, second.line.key, second.line.secret)
        with pytest.raises(SessionError, match="another machine's"):
            await join(rig, mixed)
        guessed = OfferLine(first.line.endpoint, first.line.key, bytes(16))
        with pytest.raises(SessionError, match="does not know this line"):
            await join(rig, guessed)
        assert first.offer.state is OfferState.OPEN
        await join(rig, first.line)


async def test_guessing_ends_an_offer(rig):
    async with rig.machine("a", offers=yes, knows_home=False) as machine:
        for number in range(offers.MAX_TRIES):
            guessed = OfferLine(machine.line.endpoint, machine.line.key, bytes([number]) * 16)
            with pytest.raises(SessionError):
                await join(rig, guessed)
        assert await machine.offer.wait() is OfferState.GUESSED
        with pytest.raises(SessionError, match="wrong secret"):
            await join(rig, machine.line)
        assert not machine.homes


async def test_another_version_is_named_before_anything_is_agreed_on(rig):
    async with rig.machine("a", offers=yes, knows_home=False) as machine:
        with pytest.raises(SessionError, match=r"runs veilpipe 1\.2\.3, home 9\.9"):
            await join(rig, machine.line, software="9.9")
        assert machine.offer.state is OfferState.OPEN
        assert not machine.homes


async def test_a_machine_that_is_not_there_is_one_line_that_speaks_of_nat(rig):
    async with rig.machine("a", offers=yes) as machine:
        line = machine.line
    with pytest.raises(SessionError, match=r"NAT or a firewall.*pipeline-relay") as caught:
        await join(rig, line)
    assert "\n" not in str(caught.value)


def test_a_list_of_homes_that_others_could_write_is_not_believed(rig):
    directory = rig.directory / "home"
    known = KnownHomes(directory)
    known.add(rig.home_key)
    (directory / "homes").chmod(0o666)
    with pytest.raises(Exception, match="chmod 600"):
        known.keys()
    (directory / "homes").chmod(0o600)
    (directory / "homes").write_text("nonsense\n")
    with pytest.raises(Exception, match="is no key"):
        known.keys()
