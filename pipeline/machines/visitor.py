"""Home on a visit at one of its machines."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.identity import fingerprint
from pipeline.errors import InputError, MessageError, SessionError
from pipeline.machines.links import LIMITS, MachineLink, knowing, pairing_link, provision_link
from pipeline.machines.messages import (
    PIECE_BYTES,
    WINDOW_BYTES,
    Admit,
    Describe,
    Description,
    Fine,
    GoOn,
    Join,
    Joined,
    Listing,
    Measure,
    Measured,
    Part,
    Parts,
    Probe,
    Probed,
    Put,
    Refused,
    Remove,
    Retire,
    Serve,
)
from pipeline.machines.offer_line import OfferLine
from pipeline.progress import Progress
from pipeline.protocol.messages import StrictMessage
from pipeline.protocol.peer_connections import answered_within, close_quietly, describe
from pipeline.protocol.time_limits import DEFAULT_TIMES
from transport.channel import connect_channel
from transport.dial_and_listen import TcpEndpoint, dial
from transport.errors import EndpointError, HandshakeError, NoAnswer, TransportError
from transport.handshake import Credentials, Link

Answer = TypeVar("Answer", bound=StrictMessage)


class MachineRefuses(SessionError):
    """A machine has said why it does not do something."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a machine is (see `is_place`), and the key it must show."""

    endpoint: TcpEndpoint
    key: bytes

    def __str__(self) -> str:
        """How people are told of it."""
        return f"the machine at {self.host_port}"

    @property
    def host_port(self) -> str:
        """Where it is, as manifests and people write it."""
        return str(self.endpoint).removeprefix("tcp:")

    @property
    def data_in(self) -> TcpEndpoint:
        """Where it takes what the stage before sends, and is asked for results."""
        return replace(self.endpoint, port=self.endpoint.port + 1)


class Visit:
    """Questions and orders on one link."""

    def __init__(self, address: Address, link: MachineLink) -> None:
        self.address = address
        self._link = link

    async def describe(self, head_dim: int) -> Description:
        """What it has, for a model with such heads. Raises SessionError, as all here."""
        return await self._ask(Describe(head_dim=head_dim), Description)

    async def measure(self) -> Measured:
        """How fast it is."""
        return await self._ask(Measure(), Measured)

    async def admit(self, key: bytes) -> None:
        """Let it be probed by the machine with this key."""
        await self._ask(Admit(key=key), Fine)

    async def probe(self, other: Address, *, is_stage: bool) -> Probed:
        """How far it is from another, which has admitted it; a stage takes data as well."""
        data_in = str(other.data_in) if is_stage else None
        message = Probe(address=str(other.endpoint), key=other.key, data_in=data_in)
        return await self._ask(message, Probed)

    async def parts(self) -> list[Part]:
        """What lies there."""
        return (await self._ask(Listing(), Parts)).parts

    async def remove(self, digests: list[str]) -> None:
        """Have parts removed."""
        await self._ask(Remove(digests=digests), Fine)

    async def serve(self, manifest: str, stage_idx: int) -> None:
        """Have it serve a stage of the manifest that lies there; returns when that is loaded."""
        await self._ask(Serve(manifest=manifest, stage_idx=stage_idx), Fine)

    async def retire(self) -> None:
        """Have it serve nothing."""
        await self._ask(Retire(), Fine)

    async def join(self, software: str) -> None:
        """Ask to be known there; returns when a person has said yes."""
        await self._ask(Join(software=software), Joined)

    async def put(self, digest: str, path: Path, progress: Progress | None = None) -> int:
        """Send a file as the part of that hash, from where it was cut off; how many bytes.

        Raises InputError for a file that cannot be read.
        """
        try:
            with path.open("rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                offset = first = await self._offset_of(Put(digest=digest, num_bytes=num_bytes))
                while offset < num_bytes:
                    if progress is not None:
                        progress(offset, num_bytes)
                    file.seek(offset)
                    offset = await self._send_window(file, offset, num_bytes)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        if progress is not None:
            progress(num_bytes, num_bytes)
        return num_bytes - first

    async def _offset_of(self, put: Put) -> int:
        return min((await self._ask(put, GoOn)).offset, put.num_bytes)

    async def _send_window(self, file: BinaryIO, offset: int, num_bytes: int) -> int:
        """Send what goes without an answer, and hear it; from where to go on."""
        end = min(offset + WINDOW_BYTES, num_bytes)
        with _speaking(self.address):
            while offset < end:
                piece = file.read(min(PIECE_BYTES, end - offset))
                if not piece:
                    raise InputError("the file has become shorter while it was sent")
                await self._link.send_piece(piece)
                offset += len(piece)
            await self._answer(Fine if end == num_bytes else GoOn)
        return end

    async def _ask(self, message: StrictMessage, expected: type[Answer]) -> Answer:
        with _speaking(self.address):
            await self._link.say(message)
            return await self._answer(expected)

    async def _answer(self, expected: type[Answer]) -> Answer:
        answer = await self._link.hear()
        if isinstance(answer, Refused):
            raise MachineRefuses(f"{self.address} refuses: {answer.reason}")
        if not isinstance(answer, expected):
            raise MessageError(f"it answers {answer.type!r} out of turn")
        return answer


@asynccontextmanager
async def visiting(address: Address, own: X25519PrivateKey) -> AsyncIterator[Visit]:
    """A visit at a machine that has been joined. Raises SessionError."""
    public = own.public_key().public_bytes_raw()
    link = provision_link(public, address.key)
    refusal = (
        f"{address} does not know this home, or its key is not {fingerprint(address.key)} any "
        "more: SOMEBODY ELSE MAY BE ANSWERING THERE; if it was set up anew, or does not run "
        "`stage-worker serve` any more, pair it again with a line of `stage-worker offer`, or "
        "leave it out by `pipeline-orch join --remove`"
    )
    async with _connected(address, link, knowing(own, address.key), refusal) as visit:
        yield visit


def address_of(line: OfferLine) -> Address:
    """The machine that a line is of."""
    return Address(line.endpoint, line.key)


@asynccontextmanager
async def pairing(line: OfferLine, own: X25519PrivateKey) -> AsyncIterator[Visit]:
    """The first meeting with a machine, by its line. Raises SessionError."""
    address = address_of(line)
    refusal = (
        f"{address} does not know this line: it is another machine's, or of an offer that has "
        "ended; run `stage-worker offer` there for another"
    )
    credentials = knowing(own, line.key, line.psk)
    async with _connected(address, pairing_link(line.key), credentials, refusal) as visit:
        yield visit


@asynccontextmanager
async def _connected(
    address: Address, link: Link, credentials: Credentials, refusal: str
) -> AsyncIterator[Visit]:
    try:
        with answered_within(DEFAULT_TIMES.handshake_seconds):
            sock = await dial(address.endpoint)
    except (EndpointError, trio.TooSlowError) as error:
        why = str(error) if isinstance(error, EndpointError) else f"{address}: {error}"
        raise SessionError(
            f"{why}; where a NAT or a firewall is before that machine, which then can only dial "
            "out, forward its two ports, or run a `pipeline-relay` that reaches it, and give that "
            "address to `stage-worker offer --address`"
        ) from error
    try:
        with answered_within(DEFAULT_TIMES.handshake_seconds):
            channel = await connect_channel(sock, link, credentials, LIMITS)
    except HandshakeError as error:
        raise SessionError(refusal) from error
    except NoAnswer as error:
        raise SessionError(
            f"{address} hangs up without a word: it may be loading its stage; try again in a while"
        ) from error
    except (TransportError, trio.TooSlowError) as error:
        raise SessionError(f"{address}: {describe(error)}") from error
    try:
        yield Visit(address, MachineLink(channel))
    finally:
        await close_quietly(channel)


@contextmanager
def _speaking(address: Address) -> Iterator[None]:
    """Names the machine in what goes wrong on its link. Raises SessionError."""
    try:
        yield
    except (TransportError, MessageError, trio.EndOfChannel) as error:
        raise SessionError(f"{address} is lost: {describe(error)}") from error
