"""A cluster that says of somebody else that he is a stage: what leaves this machine, all of it."""

import json
import sys
from contextlib import ExitStack

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pipeline.agreement.trust_policy import UserTrust
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.errors import StageMismatch
from pipeline.orchestrator.open_pipeline import PipelineOptions, open_pipeline
from pipeline.placement.ray import placement as ray_placement
from pipeline.placement.ray.messages import Cluster, Kept, Report, line_of
from pipeline.placement.ray.placement import RayPlacement
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.stage.worker import StageWorker
from pipeline.tasks import open_tasks
from tests.pipeline.conftest import PROMPT, Tap, address
from tests.pipeline.placement.conftest import job_of
from transport.dial_and_listen import TcpEndpoint, listen

# Stands for what speaks with Ray: each stage that is started is where a file says.
SAY = """
import json, sys
told = json.load(open(sys.argv[1]))
sys.stdin.readline()
print(told["cluster"], flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["type"] == "start":
        print(told["stages"][order["stage_idx"]], flush=True)
"""
# Noise's first message, an ephemeral key, in its frame; the next would be under the other's key.
HELLO_BYTES = 64


class Capture(Tap):
    """A link's relay, and what left over it towards the stage."""

    def __init__(self):
        super().__init__()
        self.sent = bytearray()

    async def serve(self, name, listener, target):
        self._target = target.host, target.port
        await super().serve(name, listener, target)

    async def _copy(self, source, sink):
        if sink.socket.getpeername() == self._target:
            sink = Noting(sink, self.sent)
        await super()._copy(source, sink)


class Noting:
    """A stream, all that is sent over it noted before it goes."""

    def __init__(self, stream, noted):
        self._stream, self._noted = stream, noted

    async def send_all(self, data):
        self._noted += data
        await self._stream.send_all(data)

    async def send_eof(self):
        await self._stream.send_eof()


@pytest.fixture
async def placed(deployment, tmp_path, monkeypatch):
    """Stages known by key, placed behind a capture; runs a prompt through them."""
    deployment.know_by_key(0, 1)
    with ExitStack() as stack:
        taps = {}

        def front_of(name, listener, nursery):
            front = stack.enter_context(listen(TcpEndpoint("127.0.0.1", 0)))
            taps[name] = Capture()
            nursery.start_soon(taps[name].serve, name, front, listener.endpoint)
            return address(front.endpoint)

        async def run():
            kept = []
            async with open_tasks() as nursery:
                for idx in range(2):
                    control, data = (
                        stack.enter_context(listen(TcpEndpoint("127.0.0.1", 0))) for _ in range(2)
                    )
                    nursery.start_soon(StageWorker(deployment.setup(idx)).serve, control, data)
                    at = Kept(
                        node="n", keeper_pid=1, pid=2 + idx,
                        control=front_of(f"control{idx}", control, nursery),
                        data_in=front_of(f"data{idx}", data, nursery),
                    )  # fmt: skip
                    kept.append(line_of(Report(stage_idx=idx, kept=at)).decode().strip())
                told = tmp_path / "told.json"
                cluster = line_of(Cluster(reason=None)).decode().strip()
                told.write_text(json.dumps({"cluster": cluster, "stages": kept}))
                command = (sys.executable, "-S", "-c", SAY, str(told))
                monkeypatch.setattr(ray_placement, "COMMAND", command)
                try:
                    return await through(deployment, RayPlacement(job_of(tmp_path), nursery))
                finally:
                    nursery.cancel_scope.cancel()

        yield run, taps


async def through(deployment, placement):
    limits = Limits(1, 256, chunk_tokens=16, num_stages=2)
    options = PipelineOptions(limits, times=TimeLimits(connect_seconds=60))
    manifest = deployment.pinned
    trust = UserTrust.create(manifest, deployment.identity, deployment.authority.root_cert)
    engine, tokens = PipelineEngine(limits), []
    generation = Generation(PROMPT, 5, frozenset(), SamplingParams())
    engine.submit(generation, lambda output: tokens.append(output.token_id))
    async with open_pipeline(manifest, trust, options, lambda line: None, placement) as pipeline:
        await engine.drain(pipeline)
    return tokens


async def test_stages_that_show_their_keys_serve_wherever_the_cluster_says(placed, deployment):
    run, taps = placed
    assert await run() == deployment.reference(5)
    assert all(tap.sent for tap in taps.values())
    assert len(taps["data0"].sent) > 4 * len(PROMPT)


@pytest.mark.parametrize("impostor", [0, 1])
async def test_to_another_key_not_a_byte_of_a_prompt_leaves(placed, deployment, impostor):
    run, taps = placed
    deployment.keys[impostor] = X25519PrivateKey.generate()
    with pytest.raises(StageMismatch, match=f"THE KEY OF STAGE {impostor}'S MACHINE") as caught:
        await run()
    assert "\n" not in str(caught.value)
    assert 0 < len(taps[f"control{impostor}"].sent) <= HELLO_BYTES
    # Prompts travel on data channels, and none was even dialed, the honest stage's neither.
    assert not taps["data0"].seen
    assert not taps["data1"].seen
