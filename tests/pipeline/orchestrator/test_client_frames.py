"""Where the orchestrator holds the ends of a model, nothing that a stage reads names a token.

Every frame that stages and orchestrator open is recorded in the clear, and searched.
"""

import json
import time
from contextlib import ExitStack

import msgpack
import numpy as np
import pytest
import trio
from safetensors.numpy import save_file

from pipeline.agreement.addresses import StageEndpoint
from pipeline.agreement.trust_policy import DevTrust
from pipeline.codecs.registry import make_codec
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.home_times import PARTS
from pipeline.engine.limits import Limits
from pipeline.errors import InputError
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.models.shard_model import Shard
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.orchestrator.failover import run_with_failover
from pipeline.orchestrator.model_ends import REMOTE_ENDS
from pipeline.orchestrator.open_pipeline import PipelineOptions, new_pipeline, open_pipeline
from pipeline.planning.plan import PlanOptions, plan
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.stage import session, step_executor, worker
from pipeline.stage.dial_policy import parse_networks
from pipeline.stage.worker_setup import StageSetup
from tests.pipeline.conftest import address, reserve
from transport.channel import SecureChannel
from transport.dial_and_listen import TcpEndpoint, listen
from transport.tensor_frames import DType

# Ids of four bytes that are no lengths, positions or numbers of steps.
FIRST_ID, VOCAB, WIDTH = 70_000, 71_000, 64
PROMPT = tuple(FIRST_ID + 7 * index for index in range(1, 31))
LIMITS = Limits(3, 96, chunk_tokens=16, num_stages=2)
SAMPLING = [
    SamplingParams(),
    SamplingParams(
        temperature=0.8,
        top_p=0.95,
        min_p=0.1,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        seed=2,
        logprobs=3,
    ),
    SamplingParams(temperature=0, logit_bias={FIRST_ID + 11: 3.0}, frequency_penalty=0.4),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random Llama with grouped heads, in whose vocabulary only high ids are likely."""
    directory = tmp_path_factory.mktemp("wide")
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(11)

    def normal(*shape, scale=0.2):
        return (scale * random.standard_normal(shape)).astype(np.float32)

    head = normal(VOCAB, WIDTH)
    head[:FIRST_ID] *= 1e-3
    weights = {
        "model.embed_tokens.weight": normal(VOCAB, WIDTH), "lm_head.weight": head,
        "model.norm.weight": 1 + normal(WIDTH),
    }  # fmt: skip
    for index in range(4):
        layer = f"model.layers.{index}."
        weights |= {
            layer + "input_layernorm.weight": 1 + normal(WIDTH),
            layer + "post_attention_layernorm.weight": 1 + normal(WIDTH),
            layer + "self_attn.q_proj.weight": normal(WIDTH, WIDTH),
            layer + "self_attn.k_proj.weight": normal(WIDTH // 2, WIDTH),
            layer + "self_attn.v_proj.weight": normal(WIDTH // 2, WIDTH),
            layer + "self_attn.o_proj.weight": normal(WIDTH, WIDTH),
            layer + "mlp.gate_proj.weight": normal(96, WIDTH),
            layer + "mlp.up_proj.weight": normal(96, WIDTH),
            layer + "mlp.down_proj.weight": normal(WIDTH, 96),
        }
    save_file(weights, directory / "model.safetensors")
    return directory


class Recorder:
    """Copies of all that channels of this process have opened: heads, headers and tensors."""

    def __init__(self, monkeypatch):
        self.frames, self.plain = [], []
        receive, peek = SecureChannel.receive, SecureChannel.peek

        async def received(channel):
            frame = await receive(channel)
            tensors = [(tensor.spec, bytes(tensor.data)) for tensor in frame.tensors]
            self.frames.append((bytes(frame.header), tensors))
            return frame

        async def peeked(channel):
            plain = await peek(channel)
            if plain is not None:
                self.plain.append(bytes(plain))
            return plain

        monkeypatch.setattr(SecureChannel, "receive", received)
        monkeypatch.setattr(SecureChannel, "peek", peeked)

    @property
    def all_bytes(self):
        parts = [*self.plain]
        for header, tensors in self.frames:
            parts += [header, *(data for _, data in tensors)]
        return b"\0\0".join(parts)

    def named(self, token_ids):
        """Those of the ids that occur: as an integer of either order, as msgpack has it or text."""
        data = self.all_bytes
        return {
            token_id
            for token_id in token_ids
            if any(
                form in data
                for form in (
                    token_id.to_bytes(4, "little"), token_id.to_bytes(4, "big"),
                    msgpack.packb(token_id), str(token_id).encode(),
                    np.float32(token_id).tobytes(), np.float64(token_id).tobytes(),
                )
            )
        }  # fmt: skip


@pytest.fixture
def recorder(monkeypatch):
    return Recorder(monkeypatch)


@pytest.fixture
def logits_seen(monkeypatch):
    """The logits that heads have computed in this process."""
    seen = []
    results = Shard.results

    def recorded(shard, hidden):
        chosen, logits = results(shard, hidden)
        seen.append(np.array(shard.kernels.to_host(logits)[0]))
        return chosen, logits

    monkeypatch.setattr(Shard, "results", recorded)
    return seen


class Pipelines:
    """Two stages in this process, and the orchestrator's end."""

    def __init__(self, model_dir, directory, split):
        self.model_dir, self.split = model_dir, split
        self.trust = DevTrust.create(directory / "dev")
        self.stage_trust = [DevTrust.create(directory / "dev") for _ in range(2)]
        self.manifest = plan(model_dir, PlanOptions(2, split=split))
        self.config = load_config(model_dir)

    def setup(self, idx):
        stage = self.manifest.stage(idx)
        shard = load_shard(
            self.model_dir, self.config, stage.layer_start, stage.layer_end,
            ends=NO_ENDS if self.split == "client" else None, expected_hashes=stage.weight_hashes,
        )  # fmt: skip
        return StageSetup(
            self.manifest, idx, shard, self.stage_trust[idx], "float32", 1, "cpu", 1 << 30,
            allow_dial=parse_networks(["127.0.0.0/8"]),
        )  # fmt: skip

    def options(self):
        ends = REMOTE_ENDS
        if self.split == "client":
            hashes = self.manifest.client.weight_hashes
            shard = load_shard(
                self.model_dir, self.config, 0, 0, ends=BOTH_ENDS, expected_hashes=hashes
            )
            ends = ClientEnds(shard, make_codec("F32", WIDTH))
        return PipelineOptions(LIMITS, times=TimeLimits(connect_seconds=10), ends=ends)

    def _start(self, nursery, listening):
        """Start the stages; the manifest, with where they are."""
        at = []
        for idx in range(2):
            listeners = [
                listening.enter_context(listen(TcpEndpoint("127.0.0.1", 0))) for _ in range(2)
            ]
            nursery.start_soon(worker.StageWorker(self.setup(idx)).serve, *listeners)
            at += [address(each.endpoint) for each in listeners]
        results = address(reserve())
        endpoints = [
            StageEndpoint(control=at[0], data_in=at[1], data_out=at[3]),
            StageEndpoint(control=at[2], data_in=at[3], data_out=results),
        ]
        stages = tuple(
            stage.model_copy(update={"endpoint": endpoint})
            for stage, endpoint in zip(self.manifest.stages, endpoints, strict=True)
        )
        return self.manifest.model_copy(update={"stages": stages})

    async def texts(self, *, mending=False):
        """Of three requests side by side."""
        engine, heard = PipelineEngine(LIMITS), [[] for _ in SAMPLING]
        for index, sampling in enumerate(SAMPLING):
            engine.submit(Generation(PROMPT, 12, frozenset(), sampling), heard[index].append)
        await self.drain(engine, mending=mending)
        return [[output.token_id for output in outputs] for outputs in heard]

    async def drain(self, engine, *, mending=False):
        async with trio.open_nursery() as nursery:
            with ExitStack() as listening:
                manifest = self._start(nursery, listening)
                opened = (manifest, self.trust, self.options(), lambda line: None)
                if mending:
                    async with new_pipeline(*opened) as pipeline:
                        await run_with_failover(pipeline, engine.drain, engine.scheduler, 20)
                else:
                    async with open_pipeline(*opened) as pipeline:
                        await engine.drain(pipeline)
                nursery.cancel_scope.cancel()


async def test_no_frame_holds_a_token_or_a_logit(model_dir, tmp_path, recorder, logits_seen):
    texts = await Pipelines(model_dir, tmp_path, "client").texts()
    token_ids = {*PROMPT, *(token_id for text in texts for token_id in text)}
    assert min(token_ids) >= FIRST_ID
    assert len(token_ids) > 40
    assert recorder.named(token_ids) == set()
    shapes = {(spec.dtype, spec.shape[1:]) for _, tensors in recorder.frames for spec, _ in tensors}
    assert shapes <= {(DType.F32, (WIDTH,)), (DType.U32, ())}
    empty = {spec.shape for _, ts in recorder.frames for spec, _ in ts if spec.dtype is DType.U32}
    assert empty <= {(0,)}
    data = recorder.all_bytes
    assert logits_seen
    for logits in np.concatenate(logits_seen):
        best = int(logits.argmax())
        for start in range(best - best % 4, best - best % 4 + 4, 4):
            assert logits[start : start + 4].tobytes() not in data


async def test_the_search_finds_tokens_where_stages_hold_the_ends(model_dir, tmp_path, recorder):
    texts = await Pipelines(model_dir, tmp_path, "stages").texts()
    token_ids = {*PROMPT, *(token_id for text in texts for token_id in text)}
    assert recorder.named(token_ids) == token_ids


async def test_both_splits_say_the_same_over_channels(model_dir, tmp_path):
    texts = [await Pipelines(model_dir, tmp_path, split).texts() for split in ("stages", "client")]
    assert texts[0] == texts[1]


def lie_once(monkeypatch, change):
    """The last stage's results of its ninth step are others; every other is honest."""
    results_of, count = step_executor.results_of, iter(range(1 << 30))

    def lying(*arguments):
        tensors = results_of(*arguments)
        return change(tensors) if next(count) == 9 else tensors

    monkeypatch.setattr(step_executor, "results_of", lying)


def send_twice(monkeypatch):
    """The last stage sends one result again under the header it had, in the place of the next."""
    send_step, sent = session.send_step, []

    async def replaying(channel, header, tensors):
        if len(header.timings) == 2:
            sent.append((header, tuple(tensors)))
            if len(sent) == 9:
                header, tensors = sent[7]
        await send_step(channel, header, tensors)

    monkeypatch.setattr(session, "send_step", replaying)
    monkeypatch.setattr("pipeline.stage.decode_lane.Lane.learn", lambda lane, header: None)


async def test_an_old_answer_is_refused_and_the_work_goes_on_from_its_tokens(
    model_dir, tmp_path, monkeypatch, caplog
):
    expected = await Pipelines(model_dir, tmp_path, "client").texts()
    send_twice(monkeypatch)
    assert await Pipelines(model_dir, tmp_path, "client").texts(mending=True) == expected
    assert "answered something else than step" in caplog.text


async def test_rows_of_another_shape_are_refused_and_the_work_goes_on(
    model_dir, tmp_path, monkeypatch, caplog
):
    expected = await Pipelines(model_dir, tmp_path, "client").texts()
    monkeypatch.setattr("pipeline.stage.decode_lane.Lane.learn", lambda lane, header: None)
    lie_once(monkeypatch, lambda tensors: (tensors[0],))
    assert await Pipelines(model_dir, tmp_path, "client").texts(mending=True) == expected
    assert "expected" in caplog.text


async def test_a_client_that_does_not_hold_the_ends_is_told_so(model_dir, tmp_path):
    pipelines = Pipelines(model_dir, tmp_path, "client")
    options = PipelineOptions(LIMITS, times=TimeLimits(connect_seconds=10))
    with pytest.raises(InputError, match="split is client, and embedding and head are not held"):
        async with new_pipeline(pipelines.manifest, pipelines.trust, options, print):
            pass


@pytest.mark.parametrize("split", ["client", "stages"])
async def test_every_part_of_a_step_is_timed_where_the_ends_are_at_home(model_dir, tmp_path, split):
    outputs = []
    pipelines = Pipelines(model_dir, tmp_path, split)
    engine = PipelineEngine(LIMITS)
    for sampling in SAMPLING:
        engine.submit(Generation(PROMPT, 12, frozenset(), sampling), outputs.append)
    start = time.perf_counter_ns()
    await pipelines.drain(engine)
    elapsed = time.perf_counter_ns() - start
    if split == "stages":
        assert {output.home_times for output in outputs} == {None}
        assert engine.stats.home_times == {}
        return
    parts = set(PARTS) - {"noise"}
    for output in outputs:
        assert parts - {"sample", "uncloak"} <= output.home_times.keys() <= parts
    total = engine.stats.home_times
    assert total.keys() == parts
    assert min(total.values()) > 0
    # Two steps are under way at a time, and both wait for the network.
    assert sum(total.values()) < 2 * elapsed


@pytest.mark.slow  # by the clock on the wall, which others on this machine move on as well
async def test_the_parts_of_a_token_add_up_to_its_time(model_dir, tmp_path):
    heard = []
    engine = PipelineEngine(LIMITS)
    generation = Generation(PROMPT, 40, frozenset(), SAMPLING[0])
    engine.submit(generation, lambda output: heard.append((time.perf_counter_ns(), output)))
    await Pipelines(model_dir, tmp_path, "client").drain(engine)
    (began, _), *rest = heard
    elapsed = rest[-1][0] - began
    at_home = sum(sum(output.home_times.values()) for _, output in rest)
    in_stages = sum(
        each.compute_ns + each.crypto_ns for _, output in rest for each in output.timings
    )
    assert 0.8 * elapsed < at_home + in_stages < 1.05 * elapsed
