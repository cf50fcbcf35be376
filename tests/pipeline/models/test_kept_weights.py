"""Verified weights in sealed memory: found by the next process, writable by nobody."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError, ModelError
from pipeline.kernels.huge_pages import Arena
from pipeline.kernels.kernel_selection import why_not_native
from pipeline.kernels.sealed_memory import HUGE_PAGE, SealedMemory, is_untouched
from pipeline.models.config import load_config
from pipeline.models.layer_parts import LayerParts
from pipeline.models.registry import Beside, load_shard
from pipeline.protocol.batch import Segment
from pipeline.weights import file_pieces
from pipeline.weights.checkpoint import NO_PIECES, hash_files, pin_files, weight_files

pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create") or why_not_native() is not None,
    reason="needs memory that can be sealed, and native kernels",
)

OPEN = """
import os, sys
os.setuid(65534)
try:
    open(sys.argv[1], "rb")
except PermissionError:
    print("refused")
"""


@pytest.fixture(params=["gpt2", "llama-untied-gqa"])
def model(request, make_oracle, tmp_path):
    from shutil import copytree

    return copytree(make_oracle(request.param).directory, tmp_path / "model")


def new_memory():
    found = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(found, 0o600)
    yield found
    os.close(found)


fd = pytest.fixture(new_memory)
other = pytest.fixture(new_memory)


def load(model, fd, hashes, dtype="int8", layers=None, pieces=NO_PIECES):
    config = load_config(model)
    return load_shard(
        model, config, *(layers or (0, config.num_layers)), dtype=dtype, kernels="native",
        expected_hashes=hashes, pieces=pieces, memory=None if fd is None else SealedMemory(fd),
    )  # fmt: skip


def rows_of(shard):
    ids = np.array([3, 1, 4, 1, 5])
    batch = (Segment(slot=0, position=0, num_tokens=5),)
    cache = shard.new_cache(1, 16)
    return shard.logits(shard.forward(ids, batch, cache)).tobytes()


def spoil(model):
    path = weight_files(model)[-1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_successor_computes_the_same_and_reads_no_weights(model, fd, dtype):
    hashes = hash_files(weight_files(model))
    alone = load(model, None, hashes, dtype)
    expected = rows_of(alone)
    first = load(model, fd, hashes, dtype)
    assert rows_of(first) == expected
    spoil(model)
    successor = load(model, fd, hashes, dtype)
    assert rows_of(successor) == expected
    assert rows_of(first) == expected
    assert successor.num_weight_bytes == alone.num_weight_bytes
    with pytest.raises(ModelError, match=r"model.*\.safetensors has SHA-256"):
        load(model, None, hashes, dtype)  # the next that has nothing handed over


def layers_beside(model, fd, hashes, dtype, other):
    """The first layer, with the others left in the memory `other`."""
    config = load_config(model)
    return load_shard(
        model, config, 0, 1, dtype=dtype, kernels="native", expected_hashes=hashes,
        memory=SealedMemory(fd), beside=[Beside(range(1, config.num_layers), SealedMemory(other))],
    )  # fmt: skip


def text_of(first, rest):
    batch = (Segment(slot=0, position=0, num_tokens=5),)
    rows = first.forward(np.array([3, 1, 4, 1, 5]), batch, first.new_cache(1, 16))
    return rest.logits(rest.forward(rows, batch, rest.new_cache(1, 16))).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_one_pass_over_the_files_leaves_each_stage_its_own(model, fd, other, dtype):
    hashes, num_layers = hash_files(weight_files(model)), load_config(model).num_layers
    apart = [load(model, None, hashes, dtype, each) for each in ((0, 1), (1, num_layers))]
    expected = text_of(*apart)
    first = layers_beside(model, fd, hashes, dtype, other)
    spoil(model)
    rest = load(model, other, hashes, dtype, (1, num_layers))
    assert text_of(first, rest) == expected
    assert rest.num_weight_bytes == apart[1].num_weight_bytes


def test_one_pass_over_files_that_fail_leaves_nobody_anything(model, fd, other):
    hashes = hash_files(weight_files(model))
    spoil(model)
    with pytest.raises(ModelError, match="SHA-256"):
        layers_beside(model, fd, hashes, "float32", other)
    assert is_untouched(fd)
    assert is_untouched(other)


def test_what_is_let_go_is_mapped_no_more(fd):
    inode = str(os.fstat(fd).st_ino)

    def num_mappings():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum("memfd:weights" in line and inode in line.split() for line in lines)

    memory = SealedMemory(fd)
    memory.chunk(100)[:] = 7
    assert not is_untouched(fd)
    assert num_mappings() == 1
    memory.let_go()
    assert num_mappings() == 0


TAKE_A_TURN = """
import sys
from pipeline.kernels.sealed_memory import one_at_a_time
print("asks", flush=True)
with one_at_a_time(int(sys.argv[1])):
    print("has", flush=True)
    sys.stdin.read()
"""


def test_those_who_fill_memory_take_turns_and_one_that_dies_makes_way(fd):
    def start():
        command = [sys.executable, "-c", TAKE_A_TURN, str(fd)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd]
        )

    with start() as first:
        assert [first.stdout.readline() for _ in range(2)] == ["asks\n", "has\n"]
        with start() as second:
            assert second.stdout.readline() == "asks\n"
            first.kill()
            assert second.stdout.readline() == "has\n"
            second.stdin.close()
            assert second.wait() == 0
    with start() as third:
        assert third.stdout.readline() == "asks\n"
        assert third.stdout.readline() == "has\n"
        third.kill()


def test_what_is_sealed_can_neither_be_written_nor_resized(model, fd):
    load(model, fd, hash_files(weight_files(model)))
    size = os.fstat(fd).st_size
    for change in (
        lambda: os.pwrite(fd, b"x", size // 2),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 2 * size),
    ):
        with pytest.raises(PermissionError):
            change()


def test_a_file_that_fails_leaves_no_weights_behind(model, fd):
    hashes = hash_files(weight_files(model))
    spoil(model)
    with pytest.raises(ModelError, match="SHA-256"):
        load(model, fd, hashes)
    assert os.fstat(fd).st_size == 0
    assert not SealedMemory(fd).is_sealed


def test_what_was_half_filled_is_let_go_by_the_next(fd):
    memory = SealedMemory(fd)
    memory.chunk(100)[:] = 7
    assert not SealedMemory(fd).chunk(100).any()


@pytest.mark.parametrize("change", ["precision", "layers", "hashes"])
def test_other_weights_than_those_wanted_are_left_alone(model, fd, caplog, change):
    hashes = hash_files(weight_files(model))
    load(model, fd, hashes)
    dtype = "bfloat16" if change == "precision" else "int8"
    layers = (0, 1) if change == "layers" else None
    if change == "hashes":
        spoil(model)
        hashes = hash_files(weight_files(model))
    with caplog.at_level(logging.WARNING):
        found = load(model, fd, hashes, dtype, layers)
    assert f"differing={change}" in caplog.text
    if change != "layers":
        assert rows_of(found) == rows_of(load(model, None, hashes, dtype))


def test_weights_verified_by_other_pieces_are_left_alone(model, fd, caplog, monkeypatch):
    monkeypatch.setattr(file_pieces, "MIN_PIECE_BYTES", 1 << 12)
    pins = pin_files(weight_files(model))
    hashes, pieces = [pin.digest for pin in pins], {pin.digest: pin.pieces for pin in pins}
    load(model, fd, hashes, pieces=pieces)
    with caplog.at_level(logging.WARNING):
        load(model, fd, hashes, pieces=pieces)
    assert "differing" not in caplog.text
    with caplog.at_level(logging.WARNING):
        load(model, fd, hashes)
    assert "differing=hashes" in caplog.text


def test_unverified_weights_are_not_left_to_anybody(model, fd):
    load(model, fd, None)
    assert not SealedMemory(fd).is_sealed


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_gets_at_nothing(model, fd):
    load(model, fd, hash_files(weight_files(model)))
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    path = f"/proc/{os.getpid()}/fd/{fd}"
    result = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True)
    assert result.stdout == "refused\n", result.stderr


def test_what_cannot_be_sealed_or_is_anothers_is_refused(tmp_path, fd, monkeypatch):
    with (tmp_path / "file").open("wb") as file, pytest.raises(InputError, match="sealed"):
        SealedMemory(file.fileno())
    kept = os.memfd_create("as a file in /dev/shm")
    os.write(kept, b"somebody's")
    with pytest.raises(InputError, match="sealed"):
        SealedMemory(kept)
    assert os.pread(kept, 80, 0) == b"somebody's"
    os.close(kept)
    with open(os.devnull) as nothing, pytest.raises(InputError, match="sealed"):  # noqa: PTH123
        SealedMemory(nothing.fileno())
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(InputError, match="sealed"):
        SealedMemory(read_only)
    os.close(read_only)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InputError, match="another user"):
        SealedMemory(fd)


def test_only_what_is_handed_out_takes_memory(fd):
    arena_memory = SealedMemory(fd)
    arena = Arena(arena_memory.chunk, arena_memory.prepare)
    for size in (5 << 20, 1000, 40 << 20, 40 << 20):  # the last has no room in the first chunk
        arena.take(size).fill(3)
    assert os.fstat(fd).st_blocks * 512 <= (85 << 20) + 4 * HUGE_PAGE


MAPPED = """
import sys
from pipeline.kernels.sealed_memory import SealedMemory
whole = SealedMemory(int(sys.argv[1])).chunk(int(sys.argv[2]))
assert whole.min() == whole.max() == 3
print("mapped", flush=True)
sys.stdin.read()
"""


def resident_kib(kind):
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def test_what_several_map_is_counted_once(fd):
    size = 64 << 20
    before = resident_kib("Pss")
    memory = SealedMemory(fd)
    whole = memory.chunk(size)
    memory.prepare(whole)
    whole.fill(3)
    memory.seal({})
    assert whole.max() == 3  # in this process's pages again, mapped anew
    alone = resident_kib("Pss") - before
    assert abs(alone - (size >> 10)) < (8 << 10)
    with subprocess.Popen(
        [sys.executable, "-c", MAPPED, str(fd), str(size)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(fd,),
    ) as other:  # fmt: skip
        assert other.stdout.readline() == b"mapped\n"
        shared = resident_kib("Pss") - before
        other.stdin.close()
    assert os.fstat(fd).st_blocks * 512 <= size + 2 * HUGE_PAGE
    assert abs(2 * shared - alone) < (16 << 10)


def test_parts_with_weights_of_their_own_get_them_each_time(model, fd):
    class OwnParts(LayerParts):
        def linear(self, name, spec, kernels):
            return kernels.linear(spec)

    config = load_config(model)
    hashes = hash_files(weight_files(model))
    expected = rows_of(load(model, None, hashes, "float32"))
    for _ in range(2):
        shard = load_shard(
            model, config, 0, config.num_layers, kernels="native", parts=OwnParts(),
            expected_hashes=hashes, memory=SealedMemory(fd),
        )  # fmt: skip
        assert not SealedMemory(fd).is_sealed
        assert rows_of(shard) == expected
