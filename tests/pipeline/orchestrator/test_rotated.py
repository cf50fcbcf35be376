"""With rotated shards a text is the same, and what travels is the residual stream rotated."""

import itertools

import numpy as np
import pytest

from pipeline.codecs.registry import make_codec
from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.engine.engine import PipelineEngine
from pipeline.engine.generation import Generation
from pipeline.engine.limits import Limits
from pipeline.engine.tokenizer import Tokenizer
from pipeline.errors import RequestFailed
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.models.stored_model import family_of
from pipeline.orchestrator.client_ends import ClientEnds
from pipeline.orchestrator.local_pipeline import LocalPipeline
from pipeline.orchestrator.open_pipeline import PipelineOptions
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.protocol.batch import Segment
from pipeline.protocol.time_limits import TimeLimits
from pipeline.sampling.params import SamplingParams
from pipeline.stage.dial_policy import parse_networks
from pipeline.stage.step_executor import StageCore
from pipeline.stage.worker_setup import StageSetup
from tests.pipeline.oracles import FAMILIES
from tests.pipeline.orchestrator import test_client_frames
from tests.pipeline.orchestrator.test_client_frames import (
    Pipelines,
    Recorder,
    lie_once,
    model_dir,  # noqa: F401 - a fixture
    send_twice,
)
from transport.tensor_frames import DType, Tensor

SECRET = bytes(range(32))
LIMITS = Limits(num_slots=3, max_seq_len=96, chunk_tokens=8, num_stages=3)
LOGITS_TOLERANCE = 2e-4


class Cut:
    """A model in shards, rotated or plain, whose ends are held here."""

    def __init__(self, source, directory, num_stages, rotation, **options):
        plain = plan(source, PlanOptions(num_stages, split="client", **options))
        self.manifest = cut_model(plain, source, directory, rotation=rotation)
        self.config = load_config(directory / "client", self.manifest.config_hash)
        self.ends = self._load(directory / "client", 0, 0, BOTH_ENDS, self.manifest.client)
        self.stages = [
            self._load(directory / f"stage{each.stage_idx}", each.layer_start, each.layer_end,
                       NO_ENDS, each)
            for each in self.manifest.stages
        ]  # fmt: skip

    def _load(self, directory, start, end, ends, pinned):
        return load_shard(
            directory, self.config, start, end, ends=ends, dtype=pinned.precision or "float32",
            expected_hashes=pinned.weight_hashes,
        )  # fmt: skip

    @property
    def codec(self):
        return self.manifest.activation_spec.codec

    def pipeline(self):
        limits = LIMITS.for_session(self.codec, has_client_ends=True)
        cores = [StageCore(shard, limits) for shard in self.stages]
        return LocalPipeline(cores, ClientEnds(self.ends, self.codec))

    async def texts(self):
        """Of five requests in batches."""
        engine, heard = PipelineEngine(LIMITS), [[] for _ in range(5)]
        for index, outputs in enumerate(heard):
            prompt = tuple(range(3 + index, 24 + 2 * index))
            engine.submit(Generation(prompt, 20, frozenset(), SamplingParams()), outputs.append)
        await engine.drain(self.pipeline())
        return [[output.token_id for output in outputs] for outputs in heard]

    def rows(self, token_ids):
        """A prompt's rows as they come to each stage and leave the last, and its logits."""
        segments = (Segment(0, 0, len(token_ids)),)
        kernels = self.ends.kernels
        (rows,) = kernels.to_host(self.ends.embed(np.array(token_ids), segments))
        found = [rows]
        for shard in self.stages:
            (rows,) = kernels.to_host(shard.forward(rows, segments, shard.new_cache(1, 96)))
            found.append(rows)
        return found, kernels.to_host(self.ends.logits(kernels.to_device(rows)))[0]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def cuts(family, make_oracle, tmp_path_factory):
    """(plain, rotated) in so many stages, made once."""
    made = {}

    def get(num_stages, **options):
        key = (num_stages, *options.items())
        if key not in made:
            oracle, root = make_oracle(family), tmp_path_factory.mktemp("cut")
            rotation = SecretRotation(SECRET, oracle.config.hidden_dim)
            made[key] = [
                Cut(oracle.directory, root / name, num_stages, each, **options)
                for name, each in (("plain", None), ("rotated", rotation))
            ]
        return made[key]

    return get


def before_rotation(rows, config):
    """Plain rows in double precision as rotated weights start from: LayerNorm's are centred."""
    mean = rows.mean(axis=1, keepdims=True) if family_of(config).stream.is_centred else 0.0
    return (rows - mean).astype(float)


async def test_batches_say_the_same(cuts):
    plain, rotated = cuts(3)
    expected = await plain.texts()
    assert await rotated.texts() == expected
    assert len(set(itertools.chain(*expected))) > 10


def test_logits_are_close_and_rows_are_the_plain_ones_rotated(cuts):
    ids = range(5, 45)
    (rows, logits), (others, found) = (cut.rows(ids) for cut in cuts(3))
    assert abs(logits).max() > 1
    assert abs(logits - found).max() <= LOGITS_TOLERANCE
    rotation = SecretRotation(SECRET, 64)
    for plain, other in zip(rows, others, strict=True):
        expected = rotation.apply(before_rotation(plain, cuts(3)[0].config))
        np.testing.assert_allclose(other, expected, atol=1e-3)
        assert np.linalg.norm(other - plain) > 0.5 * np.linalg.norm(plain)


def alternately(family, *choices):
    """One of them for each family, so that each is had with several."""
    return choices[list(FAMILIES).index(family) % len(choices)]


async def test_rotated_shards_come_in_every_precision(cuts, family):
    precision = alternately(family, "bfloat16", "int8")
    (rows, _), _ = (cut.rows(range(5, 45)) for cut in cuts(2))
    _, rotated = cuts(2, precision=precision)
    (others, _) = rotated.rows(range(5, 45))
    expected = SecretRotation(SECRET, 64).apply(before_rotation(rows[-1], rotated.config))
    assert np.linalg.norm(others[-1] - expected) < 0.1 * np.linalg.norm(expected)


async def test_rotated_shards_go_with_smaller_wires(cuts, family):
    _, rotated = cuts(2, wire_dtype=alternately(family, "I8", "I5"))
    found = await rotated.texts()
    assert found == await rotated.texts()
    assert all(len(text) == 20 for text in found)


@pytest.mark.slow
async def test_smollm2_says_the_same_in_three_rotated_stages(smollm2_dir, tmp_path):
    tokenizer = Tokenizer(smollm2_dir / "tokenizer.json")
    ids = tokenizer.encode(" ".join(__doc__.split() * 8))[:96]
    rotation = SecretRotation(SECRET, load_config(smollm2_dir).hidden_dim)
    plain, rotated = (
        Cut(smollm2_dir, tmp_path / name, 3, each)
        for name, each in (("plain", None), ("rotated", rotation))
    )
    (_, logits), (_, found) = (cut.rows(ids) for cut in (plain, rotated))
    assert abs(logits - found).max() <= LOGITS_TOLERANCE
    assert await rotated.texts() == await plain.texts()


class RotatedPipelines(Pipelines):
    """Two stages over channels, and the orchestrator's end, of a cut model."""

    def __init__(self, source, directory, rotation):
        super().__init__(source, directory, "client")
        self.cut = Cut(source, directory / "cut", 2, rotation)
        self.manifest = self.cut.manifest

    def setup(self, idx):
        return StageSetup(
            self.manifest, idx, self.cut.stages[idx], self.stage_trust[idx], "float32", 1, "cpu",
            1 << 30, allow_dial=parse_networks(["127.0.0.0/8"]),
        )  # fmt: skip

    def options(self):
        ends = ClientEnds(self.cut.ends, make_codec("F32", test_client_frames.WIDTH))
        return PipelineOptions(
            test_client_frames.LIMITS, times=TimeLimits(connect_seconds=10), ends=ends
        )


def rows_of(frames):
    """Every row of activations that a frame held, [rows, hidden]."""
    found = [
        np.frombuffer(data, "<f4").reshape(spec.shape)
        for _, tensors in frames
        for spec, data in tensors
        if spec.dtype is DType.F32 and len(spec.shape) == 2
    ]
    return np.concatenate(found).astype(float)


def nearest(rows, known):
    """The distance of each row to the nearest of those, relative to its length."""
    squared = (rows**2).sum(1)[:, None] + (known**2).sum(1) - 2 * rows @ known.T
    return np.sqrt(squared.clip(0).min(1) / (rows**2).sum(1))


async def test_rows_in_frames_are_rotated_ones_and_never_plain(request, tmp_path, monkeypatch):
    source, recorder = request.getfixturevalue("model_dir"), Recorder(monkeypatch)
    monkeypatch.setattr("pipeline.stage.decode_lane.Lane.learn", lambda lane, header: None)
    rotation = SecretRotation(SECRET, test_client_frames.WIDTH)
    expected = await RotatedPipelines(source, tmp_path / "a", None).texts()
    plain = rows_of(recorder.frames)
    recorder.frames.clear()
    assert await RotatedPipelines(source, tmp_path / "b", rotation).texts() == expected
    rows = rows_of(recorder.frames)
    assert len(rows) > 100
    assert nearest(rotation.undo(rows), plain).max() < 1e-3
    assert nearest(rows, plain).min() > 0.5


def without_rows(tensors):
    return tensors[:1]


def no_numbers(tensors):
    rows = np.frombuffer(tensors[1].data, "<f4").copy()
    rows[3] = np.nan
    return (tensors[0], Tensor(tensors[1].spec, rows.data.cast("B")), *tensors[2:])


@pytest.fixture
def rotated_pipelines(model_dir, tmp_path):  # noqa: F811
    rotation = SecretRotation(SECRET, test_client_frames.WIDTH)
    return lambda: RotatedPipelines(model_dir, tmp_path, rotation)


@pytest.mark.parametrize("lie", ["shape", "replay"])
async def test_a_stage_that_lies_of_shapes_or_repeats_itself_costs_no_text(
    rotated_pipelines, monkeypatch, caplog, lie
):
    pipelines = rotated_pipelines()
    expected = await pipelines.texts()
    monkeypatch.setattr("pipeline.stage.decode_lane.Lane.learn", lambda lane, header: None)
    if lie == "shape":
        lie_once(monkeypatch, without_rows)
    else:
        send_twice(monkeypatch)
    assert await pipelines.texts(mending=True) == expected
    assert "expected" in caplog.text if lie == "shape" else "answered something else" in caplog.text


async def test_rows_that_are_no_numbers_end_one_text_and_name_who_sent_them(
    rotated_pipelines, monkeypatch
):
    pipelines = rotated_pipelines()
    monkeypatch.setattr("pipeline.stage.decode_lane.Lane.learn", lambda lane, header: None)
    lie_once(monkeypatch, no_numbers)
    engine, heard = PipelineEngine(test_client_frames.LIMITS), [[] for _ in range(3)]
    for outputs in heard:
        sampling = SamplingParams()
        prompt = test_client_frames.PROMPT
        engine.submit(Generation(prompt, 12, frozenset(), sampling), outputs.append)
    await pipelines.drain(engine)
    failures = [outputs[-1] for outputs in heard if isinstance(outputs[-1], RequestFailed)]
    assert len(failures) == 1
    assert "the last stage's answer holds no numbers" in str(failures[0])
    assert sorted(len(outputs) for outputs in heard)[1:] == [12, 12]
