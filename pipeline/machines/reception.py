"""Who is let into a machine: homes it obeys, machines they admit, sessions, and one new home."""

from pipeline.machines.links import LIMITS, knowing, provision_link
from pipeline.machines.machine import Machine
from pipeline.machines.offer import Offer
from pipeline.machines.probe import probe_entrance
from pipeline.machines.visits import serve_visit
from pipeline.protocol.peer_connections import Entrance, accept_each
from pipeline.tasks import open_tasks
from transport.channel import SecureChannel
from transport.dial_and_listen import Listener
from transport.errors import TransportError


async def receive_all(machine: Machine, listener: Listener, offer: Offer | None) -> None:
    """Take up what was served last, and answer whoever comes, until cancelled."""
    own = machine.own
    public = own.public_key().public_bytes_raw()

    async def visit(channel: SecureChannel) -> None:
        await serve_visit(machine, channel)

    def entrances() -> list[Entrance]:
        found = [
            Entrance(provision_link(home, public), knowing(own, home), LIMITS, visit)
            for home in machine.homes
        ]
        found += [probe_entrance(own, guest) for guest in machine.guests]
        if machine.sessions is not None:
            found.append(machine.sessions)
        if offer is not None:
            found.append(offer.entrance)
        assert found, "`stage-worker serve` refuses to start where nobody could come in"
        return found

    def note(error: TransportError) -> None:
        if offer is not None:
            offer.note_refusal(error)

    async with open_tasks() as tasks:
        tasks.start_soon(_turn_away, listener)
        await machine.resume()
        tasks.cancel_scope.cancel()
    await accept_each(listener, entrances, note)


async def _turn_away(listener: Listener) -> None:
    """Hang up without a word while the stage is loaded.

    To whoever dials that is a peer not up yet, for which it waits. A refusal would be for good.
    """
    while True:
        (await listener.accept()).close()
