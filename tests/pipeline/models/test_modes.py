"""What MODES.md says of each mode and family is so."""

import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.codecs.secret_rotation import SecretRotation
from pipeline.errors import InputError, ModelError
from pipeline.models import families
from pipeline.models.config import load_config
from pipeline.models.ends import BOTH_ENDS, NO_ENDS
from pipeline.models.registry import load_shard
from pipeline.offload.linear_parts import MaskedParts, MixedParts
from pipeline.offload.linear_worker import LinearWorker
from pipeline.offload.mask_file import write_masks
from pipeline.offload.masks import open_masks
from pipeline.offload.ring_linear import HeldParts
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model
from pipeline.protocol.batch import Segment
from pipeline.protocol.tide_window import TideWindow
from pipeline.scx.attention_parts import AttentionParts
from pipeline.scx.attention_worker import AttentionMemory, AttentionWorker
from tests.pipeline.models.family_models import make_model
from tests.pipeline.oracles import randomise

PAGE = Path(families.__file__).with_name("MODES.md")
# Which of the tests' models stands for a row of the page.
ORACLES = {"gpt2": "gpt2", "llama": "llama-untied-gqa", "qwen2": "qwen2-qkv-bias"}
OTHERS = {"mistral, with a window": "mistral-1", "gpt_oss, without a window": "gpt_oss-2"}
IDS = np.random.default_rng(2).integers(3, 101, 21)
SIZES = SimpleNamespace(num_slots=1, max_seq_len=32)


def table():
    _, header, _, *rows = (
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in ["", *re.findall(r"^\|.*\|$", PAGE.read_text(), re.MULTILINE)]
    )
    for name, *cells in rows:
        yield from ((name, mode, cell) for mode, cell in zip(header[1:], cells, strict=True))


@pytest.fixture(scope="module")
def directory_of(make_oracle, tmp_path_factory):
    made = {}

    def get(row):
        if row not in made:
            if row in ORACLES:
                made[row] = make_oracle(ORACLES[row]).directory
            else:
                made[row] = tmp_path_factory.mktemp("family")
                randomise(make_model(OTHERS.get(row, f"{row}-0"))).save_pretrained(made[row])
        return made[row]

    return get


def load(directory, layers=None, **options):
    config = load_config(directory)
    layers = range(config.num_layers) if layers is None else layers
    return load_shard(directory, config, layers.start, layers.stop, expected_hashes=None, **options)


def rows_of(shard, inputs, window=None):
    """Through its layers, in two steps: what a prompt leaves is met by what comes behind it."""
    cache, rows = shard.new_cache(1, SIZES.max_seq_len, window), []
    for first, last in ((0, 20), (20, 21)):
        step = inputs[first:last]
        (found,) = shard.kernels.to_host(
            shard.forward(step, [Segment(0, first, last - first)], cache)
        )
        rows.append(found.copy())
    return np.concatenate(rows)


def logits_of(shard, rows):
    (found,) = shard.kernels.to_host(shard.logits(shard.kernels.to_device(rows)))
    return found


def between(home, away):
    """Ends in one hand, layers in the other."""
    (embedded,) = home.kernels.to_host(home.embed(IDS, (Segment(0, 0, len(IDS)),)))
    return logits_of(home, rows_of(away, embedded))


def client(directory, tmp_path):
    home = load(directory, range(0), ends=BOTH_ENDS)
    return between(home, load(directory, ends=NO_ENDS))


def rotate(directory, tmp_path):
    planned = plan(directory, PlanOptions(1, split="client"))
    cut_model(planned, directory, tmp_path, rotation=SecretRotation(bytes(range(32)), 64))
    home = load(tmp_path / "client", range(0), ends=BOTH_ENDS)
    return between(home, load(tmp_path / "stage0", ends=NO_ENDS))


class Near:
    """A link to a worker in this process."""

    def __init__(self, worker):
        self._worker = worker

    def ask(self, header, tensors=(), meanwhile=None):
        if meanwhile is not None:
            meanwhile()
        return self._worker.answer(header, tensors)


def by_parts(directory, parts, worker):
    shard = load(directory, parts=parts)
    parts.attach(Near(worker), SIZES)
    return logits_of(shard, rows_of(shard, IDS))


def held(directory):
    parts = HeldParts()
    load(directory, parts=parts, ends=NO_ENDS)
    return parts.linears


def offload(directory, tmp_path):
    linears = held(directory)
    write_masks(tmp_path / "masks", linears, (), 32)
    with closing(open_masks(tmp_path / "masks")) as masks:
        return by_parts(directory, MaskedParts(masks), LinearWorker(linears))


def mix(directory, tmp_path):
    load(directory, parts=MixedParts())
    return by_parts(directory, MixedParts(), LinearWorker(held(directory)))


def scx(directory, tmp_path):
    parts = AttentionParts(load_config(directory))
    return by_parts(directory, parts, AttentionWorker(AttentionMemory(None)))


def window(directory, tmp_path):
    shard, own = load(directory), TideWindow(24, 4)
    shard.check_window(own)
    return logits_of(shard, rows_of(shard, IDS, own))


def recorded(directory, tmp_path):
    shard = load(directory)
    if shard.kernels.has_decode_steps and not shard.has_decode_steps:
        raise ModelError("no")
    return logits_of(shard, rows_of(shard, IDS))


MODES = {each.__name__: each for each in (client, rotate, offload, mix, scx, window, recorded)}


@pytest.mark.parametrize(("row", "mode", "cell"), list(table()))
def test_a_mode_works_with_a_family_or_is_refused_by_name(
    directory_of, tmp_path, request, row, mode, cell
):
    if mode == "recorded":
        request.getfixturevalue("native")
    directory = directory_of(row)
    if cell != "yes":
        with pytest.raises((InputError, ModelError), match=cell):
            MODES[mode](directory, tmp_path)
        return
    shard = load(directory)
    expected = logits_of(shard, rows_of(shard, IDS))
    found = MODES[mode](directory, tmp_path)
    assert np.abs(found - expected).max() < 1e-2
    assert torch.equal(*(torch.from_numpy(each).argmax(-1) for each in (found, expected)))


def test_the_page_has_a_row_for_every_family_and_a_column_for_every_mode():
    rows = {name.partition(",")[0] for name, _, _ in table()}
    assert rows == families.FAMILIES.keys()
    assert {mode for _, mode, _ in table()} == MODES.keys()
