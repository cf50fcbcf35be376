"""Who does long work tells how far it is, from the first byte to the last."""

import pytest

from pipeline.errors import ModelError
from pipeline.models.config import load_config
from pipeline.models.registry import load_shard
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.shard import cut_model, cut_stage
from pipeline.progress import Meter, part_of
from pipeline.weights import checkpoint, file_hashes, verified_file


@pytest.fixture
def told():
    """What was told: (bytes done, of how many)."""
    return []


@pytest.fixture
def tell(told, monkeypatch):
    monkeypatch.setattr(verified_file, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(file_hashes, "READ_BYTES", 10_000)
    return lambda done, total: told.append((done, total))


def expect_whole(told, total):
    assert [each[1] for each in told] == [total] * len(told)
    done = [each[0] for each in told]
    assert done == sorted(done)
    assert done[-1] == total
    assert len(done) > 3


def test_hashing_is_told_block_by_block(tmp_path, told, tell):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(b"x" * 35_000)
    assert checkpoint.hash_files(paths, tell) == checkpoint.hash_files(paths)
    expect_whole(told, 70_000)


@pytest.mark.parametrize("is_hashed", [True, False])
@pytest.mark.parametrize("layers", [(0, 4), (1, 2)])
def test_loading_is_told_whether_bytes_are_wanted_hashed_or_skipped(
    tiny_model, told, tell, is_hashed, layers
):
    path = tiny_model / "model.safetensors"
    hashes = checkpoint.hash_files([path]) if is_hashed else None
    load_shard(tiny_model, load_config(tiny_model), *layers, expected_hashes=hashes, progress=tell)
    expect_whole(told, path.stat().st_size)


def test_planning_and_cutting_are_told_as_one_piece_of_work(tiny_model, tmp_path, told, tell):
    size = (tiny_model / "model.safetensors").stat().st_size
    manifest = plan(tiny_model, PlanOptions(2), tell)
    expect_whole(told, size)
    told.clear()
    pinned = cut_model(manifest, tiny_model, tmp_path / "all", progress=tell)
    expect_whole(told, 2 * size)
    told.clear()
    cut_stage(pinned, 0, tiny_model, tmp_path / "one", tell)
    expect_whole(told, size)


def test_a_file_that_is_not_there_is_named_by_whoever_reads_it(tmp_path, tell):
    with pytest.raises(ModelError, match="nowhere"):
        checkpoint.hash_files([tmp_path / "nowhere"], tell)


def test_nobody_need_listen():
    Meter(10, None).add(10)
    assert part_of(None, 0, 1) is None
