"""An attested pipeline in this process, for tests that look on and tests that attack it."""

import os
import random
import socket
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime

import pytest
import torch
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.addresses import StageEndpoint, TcpAddress
from pipeline.agreement.identity import create_identity
from pipeline.agreement.trust_policy import EnclaveTrust, KeyedTrust, UserTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.stage.dial_policy import parse_networks
from pipeline.stage.worker import StageWorker
from pipeline.stage.worker_setup import StageSetup
from transport.attestation.dev_authority import DevAttester, DevAuthority
from transport.attestation.evidence_binding import EvidenceKind
from transport.dial_and_listen import TcpEndpoint, dial, listen

PCRS = [{0: bytes([i + 1]) * 48, 1: b"\x55" * 48, 2: bytes([i + 101]) * 48} for i in range(3)]
PROMPT = tuple(range(100, 164))


class Nsm:
    """A security module whose documents chain to a test root."""

    kind = EvidenceKind.NITRO

    def __init__(self, authority, pcrs):
        self._attester = DevAttester(authority, pcrs)

    def attest(self, binding):
        return self._attester.attest(binding)


class Tap:
    """A malicious relay: passes bytes on and keeps a copy."""

    def __init__(self):
        self.seen = bytearray()

    async def serve(self, name, listener, target):
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._bridge, name, await listener.accept(), target)

    async def _bridge(self, name, incoming, target):
        async with trio.SocketStream(trio.socket.from_stdlib_socket(incoming)) as near:
            far = trio.SocketStream(trio.socket.from_stdlib_socket(await dial(target)))
            async with far, trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, near, far)
                nursery.start_soon(self._copy, far, near)

    async def _copy(self, source, sink):
        try:
            async for data in source:
                self.seen += data
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


class Deployment:
    """Two stages in this process, behind a relay, with pinned measurements.

    The relay is asked to carry, by name: control0, data0, control1, data1 and results.
    """

    PCRS = PCRS
    PROMPT = PROMPT

    def __init__(self, model_dir, directory):
        self.authority = DevAuthority.create(datetime.now(UTC))
        self.identity = directory / "key.pem"
        key = create_identity(self.identity)
        self.model_dir = model_dir
        self.tap = Tap()
        self.pcrs = list(PCRS)
        self.keys = [X25519PrivateKey.generate() for _ in range(2)]
        self.attesters = {}
        self.planned = plan(model_dir, PlanOptions(2, orchestrator_keys=(key,)))
        self.pinned = self._pin(PCRS)

    def _pin(self, pcrs):
        stages = [
            stage.model_copy(
                update={"expected_measurements": {i: v.hex() for i, v in pcrs[idx].items()}}
            )
            for idx, stage in enumerate(self.planned.stages)
        ]
        return self.planned.model_copy(update={"stages": tuple(stages)})

    def know_by_key(self, *keyed):
        """Have the manifest know these stages by their machines' keys."""
        stages = list(self.planned.stages)
        for idx in keyed:
            listed = {"machine_keys": (self.keys[idx].public_key().public_bytes_raw().hex(),)}
            stages[idx] = stages[idx].model_copy(update=listed)
        self.planned = self.planned.model_copy(update={"stages": tuple(stages)})
        self.pinned = self._pin([{} if idx in keyed else pcrs for idx, pcrs in enumerate(PCRS)])

    def module(self, idx):
        """The security module of a stage's enclave."""
        return Nsm(self.authority, self.pcrs[idx])

    def setup(self, idx):
        config = load_config(self.model_dir)
        stage = self.planned.stage(idx)
        shard = load_shard(
            self.model_dir, config, stage.layer_start, stage.layer_end,
            expected_hashes=stage.weight_hashes,
        )  # fmt: skip
        root = self.authority.root_cert
        if stage.machine_keys and idx not in self.attesters:
            trust = KeyedTrust(self.keys[idx], self.planned, root)
        else:
            attester = self.attesters.get(idx) or self.module(idx)
            trust = EnclaveTrust(self.keys[idx], attester, self.planned, root)
        return StageSetup(
            self.planned, idx, shard, trust, "float32", 1, "cpu", 1 << 30,
            allow_dial=parse_networks(["127.0.0.0/8"]),
        )  # fmt: skip

    @asynccontextmanager
    async def running(self, *, fetches=False):
        """Start stages and relay; yields the manifest a user holds, with the relay's addresses.

        `fetches`: the orchestrator dials the last stage for its results.
        """
        with ExitStack() as stack:

            def bound():
                return stack.enter_context(listen(TcpEndpoint("127.0.0.1", 0)))

            async with trio.open_nursery() as nursery:
                results = reserve()
                fronts = []
                for idx in range(2):
                    control, data = bound(), bound()
                    nursery.start_soon(StageWorker(self.setup(idx)).serve, control, data)
                    for name, listener in (("control", control), ("data", data)):
                        fronts.append(bound())
                        nursery.start_soon(
                            self.tap.serve, f"{name}{idx}", fronts[-1], listener.endpoint
                        )
                fronts.append(bound())
                nursery.start_soon(self.tap.serve, "results", fronts[-1], results)
                at = [address(front.endpoint) for front in fronts]
                endpoints = [
                    StageEndpoint(control=at[0], data_in=at[1], data_out=at[3]),
                    StageEndpoint(
                        control=at[2], data_in=at[3], data_out=None if fetches else at[4]
                    ),
                ]
                stages = tuple(
                    stage.model_copy(update={"endpoint": endpoint})
                    for stage, endpoint in zip(self.pinned.stages, endpoints, strict=True)
                )
                pinned = self.pinned.model_copy(update={"stages": stages})
                yield pinned, None if fetches else results
                nursery.cancel_scope.cancel()

    async def generate(self, manifest, results, num_tokens=12):
        trust = UserTrust.create(manifest, self.identity, self.authority.root_cert)
        limits = Limits(1, 256, chunk_tokens=16, num_stages=2)  # two steps are under way at first
        options = PipelineOptions(
            limits, times=TimeLimits(connect_seconds=10), data_out_listen=results
        )
        engine, tokens = PipelineEngine(limits), []
        generation = Generation(PROMPT, num_tokens, frozenset(), SamplingParams())
        engine.submit(generation, lambda output: tokens.append(output.token_id))
        async with open_pipeline(manifest, trust, options, lambda line: None) as pipeline:
            await engine.drain(pipeline)
        return tokens

    def reference(self, num_tokens):
        """What transformers generates."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)
        output = model.generate(
            torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return output[0, len(PROMPT) :].tolist()


def reserve():
    """A free port that nobody else takes before it is listened on.

    Not one of those that outgoing connections are given, nor of another process of these tests.
    """
    begin = 16000 + 200 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 20)
    for port in random.sample(range(begin, begin + 200), 200):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return TcpEndpoint("127.0.0.1", port)
    raise AssertionError("no free port")


def address(endpoint):
    return TcpAddress(type="tcp", addr=f"{endpoint.host}:{endpoint.port}")


@pytest.fixture(scope="module")
def shards(tiny_model):
    """The first layer, the two after it, and the rest, for native kernels."""
    if why := why_not_native():
        pytest.skip(f"no native kernels: {why}")
    config = load_config(tiny_model)
    return [
        load_shard(tiny_model, config, *layers, kernels="native", expected_hashes=None)
        for layers in ((0, 1), (1, 3), (3, 4))
    ]


@pytest.fixture
def deployment(tiny_model, tmp_path):
    return Deployment(tiny_model, tmp_path)
