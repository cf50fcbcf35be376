"""A stage between two channels, with the straight way through it or without."""

import os
import socket

import numpy as np

from pipeline.codecs.registry import make_codec
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import StepGate, receive_step, send_step
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import (
    StageTiming,
    StepHeader,
    StepKind,
)
from pipeline.protocol.step_limits import SessionLimits, token_ids_to_wire
from pipeline.stage.activation_log import ActivationLog
from pipeline.stage.decode_lane import Lane
from pipeline.stage.stage_metrics import StageMeter
from pipeline.stage.step_executor import StageCore
from transport.channel import SecureChannel
from transport.cipher import AEADS, CipherState
from transport.handshake import Session
from transport.nonblocking_socket import Wire
from transport.records import RecordOpener, RecordSealer
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import Tensor

SLOTS, POSITIONS, WIDTH = 4, 32, 64
LIMITS = SessionLimits(SLOTS, POSITIONS, 32, make_codec("F32", WIDTH))
OFTEN = RekeyPolicy(max_records=5)


def cipher(key):
    return CipherState(AEADS["ChaChaPoly"], key)


def channels(limits, policy):
    """Two ends of a data channel; both wait in place."""
    key = os.urandom(32)

    def session():
        sealer, opener = RecordSealer(cipher(key), policy), RecordOpener(cipher(key), policy)
        return Session(None, b"", sealer, opener)

    ends = [SecureChannel(Wire(sock), session(), limits) for sock in socket.socketpair()]
    for end in ends:
        end.wait_in_place(1)
    return ends


class Stage:
    """A stage between two channels, whose other ends are here."""

    def __init__(self, shard, idx, *, has_lane, policy=OFTEN):
        is_last = shard.layer_end == shard.config.num_layers
        log = None if is_last else ActivationLog(SLOTS, POSITIONS, WIDTH)
        self.core, self.idx = StageCore(shard, LIMITS, log), idx
        self.meter = StageMeter()
        self.gate = StepGate(LIMITS, lambda header, specs: None)
        self.result_gate = StepGate(LIMITS, lambda header, specs: None)
        self.source, self.upstream = channels(self.gate.frame_limits(1 << 20), policy)
        self.downstream, self.sink = channels(self.result_gate.frame_limits(1 << 20), policy)
        self.lane = None
        if has_lane:
            self.lane = Lane(self.core, self.meter, self.upstream, self.downstream, idx)
        self.num_ordinary = 0

    async def serve(self):
        """What `StageSession` does, until nothing more has come."""
        while True:
            if self.lane is not None:
                await self.lane.serve()
            if self.upstream._receiver.is_idle and not self.upstream._wire.has_come(0):
                return  # whoever sends has done so
            header, tensors = await receive_step(self.upstream, self.gate)
            self.num_ordinary += 1
            timing = self.meter.step(0, 0, 0)
            for each, outputs in self.core.take(header, tensors):
                await send_step(self.downstream, each.with_timing(timing), outputs)
            self.core.keep()
            if self.lane is not None:
                self.lane.learn(header)

    async def run(self, header, tensors):
        """One step through the stage; what comes out, its timings left out."""
        await send_step(self.source, header, tensors)
        await self.serve()
        result, outputs = await receive_step(self.sink, self.result_gate)
        assert len(result.timings) == len(header.timings) + 1
        contents = [(tensor.spec, bytes(tensor.data)) for tensor in outputs]
        return result._replace(timings=()), contents

    async def aclose(self):
        for channel in (self.source, self.upstream, self.downstream, self.sink):
            await channel.aclose()


def rows(shard, count, seed):
    """Inputs that depend on the seed alone."""
    random = np.random.default_rng(seed)
    if shard.is_first:
        return (token_ids_to_wire(random.integers(0, 50, count)),)
    (spec,) = LIMITS.codec.specs(count)
    return (Tensor(spec, random.standard_normal((count, WIDTH), "f4").data.cast("B")),)


def header(stage, number, *segments, wants=Want.TOKEN, kind=StepKind.STEP):
    timings = (StageTiming(1, 2, 3),) * stage.idx
    all_wants = (wants,) * len(segments) if isinstance(wants, Want) else wants
    return StepHeader(kind, number, tuple(Segment(*each) for each in segments), all_wants, timings)


async def run_both(stages, number, *segments, tensors=None, **fields):
    """A step through both stages, which must do the same."""
    results = []
    for stage in stages:
        each = header(stage, number, *segments, **fields)
        inputs = tensors or rows(stage.core.shard, each.num_tokens, number)
        results.append(await stage.run(each, inputs))
    assert results[0] == results[1]
    straight, ordinary = (stage.core for stage in stages)
    assert straight.cache.lengths == ordinary.cache.lengths
    if straight.log is not None:
        replayed = [
            [(header, np.asarray(kept).tobytes()) for header, kept in core.log.replay(2, 64)]
            for core in (straight, ordinary)
        ]
        assert replayed[0] == replayed[1]
    return results[0]


async def run_one(stage, number, *segments):
    each = header(stage, number, *segments)
    await stage.run(each, rows(stage.core.shard, each.num_tokens, number))


async def prefill(stages):
    await run_both(stages, 0, (0, 0, 3), (1, 0, 5), (2, 0, 1))
