"""What home finds out of its machines before it splits a model: what they have, how far apart."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.errors import InputError, SessionError
from pipeline.machines.messages import Description, Measured, Probed
from pipeline.machines.probe import probe, probe_entrance
from pipeline.machines.visitor import Address, MachineRefuses, Visit, visiting
from pipeline.protocol.peer_connections import accept_each
from pipeline.tasks import open_tasks
from transport.dial_and_listen import Listener, TcpEndpoint, listen
from transport.errors import EndpointError

# Home's place among the machines, where ways lead to.
HOME = -1
_ANY = "0.0.0.0"  # noqa: S104 (while ways are measured, to whoever has a listed key)


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A machine, and what it has said of itself."""

    address: Address
    description: Description
    measured: Measured
    # Of the parts that lie there already.
    parts_bytes: int
    # Where it would send results; None: home comes for them.
    home: TcpEndpoint | None


@dataclass(frozen=True, slots=True)
class Survey:
    """All machines, and the ways between them and home that there are, by index."""

    machines: tuple[Surveyed, ...]
    ways: Mapping[tuple[int, int], Probed]
    # Why there is no way where there is none.
    problems: Mapping[tuple[int, int], str]


class _Unreached(SessionError):
    """Home does not reach a machine where stages do."""


async def survey(
    addresses: Sequence[Address],
    own: X25519PrivateKey,
    head_dim: int,
    software: str,
    home: TcpEndpoint | None,
    tell: Callable[[str], None],
) -> Survey:
    """Visit all machines at once. No `home`: it comes for the results.

    Raises SessionError, and InputError for a machine of another version.
    """
    async with _visits(addresses, own) as visits:
        tell(f"asking and measuring {len(visits)} machine{'s' if visits[1:] else ''}")
        machines: list[Surveyed | None] = [None] * len(visits)

        async def ask(index: int, visit: Visit) -> None:
            description = await visit.describe(head_dim)
            if description.software != software:
                raise InputError(
                    f"{visit.address} runs veilpipe {description.software}, this one {software}; "
                    "install the same version on both"
                )
            measured = await visit.measure()
            parts_bytes = sum(part.num_bytes for part in await visit.parts())
            machines[index] = Surveyed(visit.address, description, measured, parts_bytes, home)

        async with open_tasks() as tasks:
            for index, visit in enumerate(visits):
                tasks.start_soon(ask, index, visit)
        found = tuple(each for each in machines if each is not None)
        tell("measuring the ways between them")
        ways, problems = await _ways(visits, found, own)
    return Survey(found, ways, problems)


async def _ways(
    visits: Sequence[Visit], machines: Sequence[Surveyed], own: X25519PrivateKey
) -> tuple[dict[tuple[int, int], Probed], dict[tuple[int, int], str]]:
    """One after the other: two at once would share what is measured."""
    ways: dict[tuple[int, int], Probed] = {}
    problems: dict[tuple[int, int], str] = {}
    public = own.public_key().public_bytes_raw()

    async def note(hop: tuple[int, int], probing: Awaitable[Probed]) -> None:
        try:
            ways[hop] = await probing
        except (MachineRefuses, _Unreached) as error:
            problems[hop] = str(error)

    async with _at_home(machines, own):
        for here, visit in enumerate(visits):
            for there, machine in enumerate(machines):
                if there == here:
                    continue
                await visits[there].admit(visit.address.key)
                await note((here, there), visit.probe(machine.address, is_stage=True))
            await note((HOME, here), _from_home(visit, own))
            if (home := machines[here].home) is not None:
                await note((here, HOME), visit.probe(Address(home, public), is_stage=False))
            elif (HOME, here) in ways:
                ways[here, HOME] = ways[HOME, here]
    return ways, problems


async def _from_home(visit: Visit, own: X25519PrivateKey) -> Probed:
    """How home, which dials the first machine and comes for results, reaches one of them.

    Raises _Unreached, or SessionError where the visit fails.
    """
    await visit.admit(own.public_key().public_bytes_raw())
    address = visit.address
    try:
        return await probe(own, address.endpoint, address.key, address.data_in)
    except SessionError as error:
        raise _Unreached(f"{address}: {error}") from error


@asynccontextmanager
async def _visits(
    addresses: Sequence[Address], own: X25519PrivateKey
) -> AsyncIterator[list[Visit]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(visiting(each, own)) for each in addresses]


@asynccontextmanager
async def _at_home(machines: Sequence[Surveyed], own: X25519PrivateKey) -> AsyncIterator[None]:
    """Answer where results will be awaited, so that machines can see how far that is."""
    entrances = [probe_entrance(own, machine.address.key) for machine in machines]
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(_listen_at(where))
            for where in {machine.home: None for machine in machines}
            if where is not None
        ]
        async with open_tasks() as tasks:
            for listener in listeners:
                tasks.start_soon(accept_each, listener, lambda: entrances)
            yield
            tasks.cancel_scope.cancel()


def _listen_at(where: TcpEndpoint) -> Listener:
    try:
        # Where another machine passes on to this one, its address is not for binding.
        with suppress(EndpointError):
            return listen(where)
        return listen(TcpEndpoint(_ANY, where.port))
    except EndpointError as error:
        raise InputError(
            f"results would come in at {where}, and that cannot be had here: {error}; "
            "give another with --home"
        ) from error
