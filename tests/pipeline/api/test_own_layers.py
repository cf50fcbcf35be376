"""Who follows LAYERS.md has stages of layers of one's own, served and asked like any others."""

import itertools
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio

import pipeline.api
from pipeline.agreement.manifest import build_manifest
from pipeline.api import DevTrust, SamplingParams, connect
from pipeline.codecs.registry import make_codec
from pipeline.errors import InputError, MessageError, ModelError, RequestFailed, SessionError
from pipeline.models.own_layers import OwnShard
from pipeline.protocol.batch import Segment
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import StepHeader, StepKind
from pipeline.protocol.step_limits import SessionLimits, token_ids_from_wire, token_ids_to_wire
from pipeline.protocol.tide_window import TideWindow
from pipeline.stage.step_executor import StageCore
from tests.pipeline.pages import written_down

PAGE = Path(pipeline.api.__file__).with_name("LAYERS.md")
PROMPT = (3, 20, 90)


@pytest.fixture(scope="module")
def page():
    return written_down(PAGE, "own_layers_page")


def sums(prompt, count):
    """What the page's model says after a prompt."""
    text = list(prompt)
    for _ in range(count):
        text.append(sum(text) % 97)
    return text[len(prompt) :]


@pytest.fixture
def manifest(page, tmp_path):
    """Three stages at UNIX sockets, of a layer each."""

    def unix(name):
        return {"type": "unix", "path": str(tmp_path / name)}

    return build_manifest(
        {
            "model_name": "sums", "model_version": "1", "total_layers": 3,
            "stages": [
                {"stage_idx": i, "layer_start": i, "layer_end": i + 1,
                 "endpoint": {"control": unix(f"c{i}"), "data_in": unix(f"d{i}"),
                              "data_out": unix(f"d{i + 1}")}}
                for i in range(3)
            ],
            "activation_spec": {"dtype": "F32", "hidden_dim": page.WIDTH, "max_seq_len": 64},
        },
        "sums",
    )  # fmt: skip


@asynccontextmanager
async def served(page, manifest, tmp_path):
    async with trio.open_nursery() as nursery:
        for idx in range(len(manifest.stages)):
            await nursery.start(partial(page.serve, manifest, idx, tmp_path / "dev"))
        yield
        nursery.cancel_scope.cancel()


async def test_the_page_is_served_and_asked_as_it_says(page, manifest, tmp_path):
    async with served(page, manifest, tmp_path):
        assert await page.text(manifest, tmp_path / "dev", PROMPT, 8) == sums(PROMPT, 8)
        # One session after another, and requests side by side.
        trust, found = DevTrust.for_manifest(manifest, tmp_path / "dev"), {}
        async with connect(manifest, trust, max_requests=2) as connection:

            async def ask(prompt, sampling):
                tokens = connection.generate(prompt, 8, sampling)
                found[prompt] = [token.token_id async for token in tokens]

            async with trio.open_nursery() as nursery:
                for last in range(5):
                    drawn = SamplingParams(temperature=1.0, top_k=1, seed=last)
                    nursery.start_soon(ask, (*PROMPT, last), drawn)
        assert found == {(*PROMPT, last): sums((*PROMPT, last), 8) for last in range(5)}


async def test_layers_that_fail_cost_their_session_and_not_their_stage(
    page, manifest, tmp_path, monkeypatch
):
    async with served(page, manifest, tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr(page.SumsOfSlots, "forward", lambda *_: 1 / 0)
            with pytest.raises((RequestFailed, SessionError)):
                await page.text(manifest, tmp_path / "dev", PROMPT, 3)
        assert await page.text(manifest, tmp_path / "dev", PROMPT, 3) == sums(PROMPT, 3)


@pytest.fixture
def core(page):
    return StageCore(OwnShard(page.Sums(), range(3), 3, page.WIDTH, 64), limits(page))


def limits(page, num_slots=2):
    return SessionLimits(num_slots, 64, 34, make_codec("F32", page.WIDTH))


NUMBERS = itertools.count()


def step(kind, *segments):
    wants = (Want.TOKEN,) * len(segments) if kind is StepKind.STEP else ()
    return StepHeader(kind, next(NUMBERS), tuple(segments), wants=wants)


def computed(core, *texts):
    """The next token of each slot's text, from where the slot ends."""
    lengths = core.cache.lengths
    segments = [Segment(slot, lengths[slot], len(text)) for slot, text in texts]
    ids = np.array([token_id for _, text in texts for token_id in text], np.uint32)
    (found,) = core.step(step(StepKind.STEP, *segments), (token_ids_to_wire(ids),))
    return token_ids_from_wire(found).tolist()


def test_slots_are_forgotten_copied_and_rewound_as_the_stage_says(core):
    assert computed(core, (0, [1, 2]), (1, [5])) == [3, 5]
    assert computed(core, (0, [3])) == [6]
    core.step(step(StepKind.TRUNCATE, Segment(0, 1, 0)), ())
    assert computed(core, (0, [4])) == [5]
    core.step(step(StepKind.TRUNCATE, Segment(1, 0, 0)), ())
    core.step(step(StepKind.COPY, Segment(0, 0, 2), Segment(1, 0, 2)), ())
    assert computed(core, (1, [10])) == [15]
    core.rewind([0, 1])
    assert computed(core, (0, [7]), (1, [8])) == [7, 9]
    with pytest.raises(MessageError, match="holds"):
        core.step(
            step(StepKind.STEP, Segment(0, 5, 1)), (token_ids_to_wire(np.ones(1, np.uint32)),)
        )


def test_what_is_no_row_of_the_model_is_named(core, monkeypatch):
    states = core.cache.states
    monkeypatch.setattr(states, "forward", lambda rows, batch: np.zeros((len(rows), 3)))
    with pytest.raises(ModelError, match=r"returned \[1, 3\], expected \[1, 8\]"):
        computed(core, (0, [1]))


def test_a_window_is_refused(page):
    with pytest.raises(InputError, match="window"):
        OwnShard(page.Sums(), range(3), 3, page.WIDTH, 64).check_window(TideWindow(32, 4))
