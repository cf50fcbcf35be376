"""A visit of a home on its machine: questions, parts, orders, one after the other."""

import logging

import trio

from pipeline.errors import InputError, MessageError, PipelineError
from pipeline.machines.links import MachineLink
from pipeline.machines.machine import Machine
from pipeline.machines.measure import measure
from pipeline.machines.messages import (
    MAX_PARTS,
    WINDOW_BYTES,
    Admit,
    Describe,
    Description,
    Fine,
    GoOn,
    Listing,
    MachineMessage,
    Measure,
    Measured,
    Part,
    Parts,
    Probe,
    Put,
    Remove,
    Retire,
    Serve,
)
from pipeline.machines.part_store import PartRefused, PartStore, Upload
from pipeline.machines.probe import probe
from pipeline.machines.served_stage import Order
from pipeline.protocol.peer_connections import close_quietly, describe
from transport.channel import SecureChannel
from transport.dial_and_listen import parse_endpoint
from transport.errors import TransportError

logger = logging.getLogger(__name__)

# Heads of a size that all kernels take, for what is measured without any.
_ANY_HEAD = 64


async def serve_visit(machine: Machine, channel: SecureChannel) -> None:
    """Do what a home asks for until it leaves; what cannot be done is answered with the reason."""
    link = MachineLink(channel)
    try:
        while True:
            message = await link.hear()
            try:
                await _answer(machine, link, message)
            except (MessageError, trio.EndOfChannel, trio.ClosedResourceError):
                raise
            except (PipelineError, TransportError) as error:
                # A link that has failed fails again here, and ends the visit.
                logger.info("event=refused order=%s error=%s", message.type, describe(error))
                await link.refuse(describe(error))
            except Exception as error:
                # A defect, or a disk that errs, must not cost the stage that is served.
                name = type(error).__name__
                is_verbose = logger.isEnabledFor(logging.DEBUG)
                logger.error(
                    "event=failed order=%s type=%s", message.type, name, exc_info=is_verbose
                )
                await link.refuse(f"internal error ({name}); its log may say more")
    except (TransportError, MessageError, trio.EndOfChannel, trio.ClosedResourceError) as error:
        logger.debug("event=visit_over error=%s", describe(error))
    finally:
        await close_quietly(channel)


async def _answer(machine: Machine, link: MachineLink, message: MachineMessage) -> None:
    match message:
        case Describe(head_dim=head_dim):
            await link.say(_description(machine, head_dim))
        case Measure():
            await link.say(_measured(machine))
        case Admit(key=key):
            machine.admit(key)
            await link.say(Fine())
        case Probe():
            endpoint = parse_endpoint(message.address)
            data_in = None if message.data_in is None else parse_endpoint(message.data_in)
            await link.say(await probe(machine.own, endpoint, message.key, data_in))
        case Listing():
            await link.say(_parts(machine))
        case Put():
            await _take_part(machine.store, link, message)
        case Remove(digests=digests):
            machine.store.remove(digests, _used(machine))
            await link.say(Fine())
        case Serve():
            _require_free(machine, link.peer_key)
            await machine.take_up(Order(message.manifest, message.stage_idx), link.peer_key)
            await link.say(Fine())
        case Retire():
            _require_free(machine, link.peer_key)
            await machine.retire()
            await link.say(Fine())
        case _:
            raise InputError(f"{message.type!r} is nothing that a machine is asked")


def _description(machine: Machine, head_dim: int) -> Description:
    kernels = machine.kernels(head_dim)
    served = machine.served
    return Description(
        software=machine.software,
        cores=machine.compute.num_threads,
        # What is loaded makes way for what comes.
        memory_bytes=kernels.free_bytes() + (0 if served is None else served.num_bytes),
        disk_bytes=machine.store.free_bytes(),
        kernels=kernels.name,
    )


def _measured(machine: Machine) -> Measured:
    if machine.is_busy():
        raise InputError("a session is under way on this machine, which cannot measure meanwhile")
    bytes_per_second, flops = measure(machine.kernels(_ANY_HEAD))
    return Measured(bytes_per_second=bytes_per_second, flops=flops)


def _require_free(machine: Machine, home: bytes) -> None:
    if machine.is_busy(home):
        raise InputError(
            "a session of another orchestrator is under way on this machine; wait for its end"
        )


def _used(machine: Machine) -> frozenset[str]:
    return frozenset() if machine.served is None else machine.served.digests


def _parts(machine: Machine) -> Parts:
    used = _used(machine)
    found = [
        Part(digest=each.digest, num_bytes=each.num_bytes, is_used=each.digest in used)
        for each in machine.store.parts()
    ]
    return Parts(parts=found[:MAX_PARTS])


async def _take_part(store: PartStore, link: MachineLink, put: Put) -> None:
    if store.has(put.digest):
        await link.say(GoOn(offset=put.num_bytes))
        return
    # In a thread, since what lies there from before is read first.
    with await trio.to_thread.run_sync(store.begin, put.digest, put.num_bytes) as upload:
        if upload.is_whole():
            await trio.to_thread.run_sync(upload.finish)
            await link.say(GoOn(offset=put.num_bytes))
            return
        await link.say(GoOn(offset=upload.offset))
        while not upload.is_whole():
            await _take_window(upload, link, put.num_bytes)
            if not upload.is_whole():
                await link.say(GoOn(offset=upload.offset))
        await trio.to_thread.run_sync(upload.finish)
    logger.info("event=part_stored part=%s bytes=%d", put.digest[:16], put.num_bytes)
    await link.say(Fine())


async def _take_window(upload: Upload, link: MachineLink, num_bytes: int) -> None:
    """All that is sent before we are heard again, stored or not. Raises PartRefused after it."""
    left = min(WINDOW_BYTES, num_bytes - upload.offset)
    problem: PartRefused | None = None
    while left > 0:
        piece = await link.receive_piece()
        left -= len(piece)
        try:
            if problem is None:
                upload.write(piece)
        except PartRefused as error:
            problem = error
    if problem is not None:
        raise problem
