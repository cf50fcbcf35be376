"""A file's pieces: those with something wanted are verified to the byte, others are not read."""

import hashlib
import os
import random
import threading
from itertools import chain, pairwise

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import ModelError
from pipeline.weights import file_pieces, verified_file
from pipeline.weights.checkpoint import hash_files, load_tensors, pin_files
from pipeline.weights.checkpoint_header import fill, read_header
from pipeline.weights.file_pieces import FilePieces, PieceCheck
from pipeline.weights.tensor_sinks import CopySink

PIECE = 256
WANTED = ("b", "d")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(file_pieces, "MIN_PIECE_BYTES", PIECE)
    monkeypatch.setattr(verified_file, "BLOCK_BYTES", 96)


@pytest.fixture
def path(tmp_path):
    values = np.random.default_rng(1)
    tensors = {
        name: values.standard_normal((rows, 5), np.float32)
        for name, rows in zip("abcde", (90, 70, 80, 1, 64), strict=True)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def load(path, pin, num_threads=1, wanted=WANTED, **options):
    with path.open("rb", buffering=0) as file:
        shapes = {each.name: each.shape for each in read_header(file, path).tensors}
    found = {name: np.zeros(shapes[name], np.float32) for name in wanted}
    load_tensors(
        path.parent, {name: CopySink(array) for name, array in found.items()},
        expected_hashes=[pin.digest], pieces={pin.digest: pin.pieces}, num_threads=num_threads,
        **options,
    )  # fmt: skip
    return found


def needed_bytes(path):
    """Which of the file's bytes are in pieces with its header or a wanted tensor."""
    with path.open("rb", buffering=0) as file:
        header = read_header(file, path)
    begin, size = len(header.raw), path.stat().st_size
    used = [range(begin)]
    used += [
        range(begin + each.start, begin + each.end)
        for each in header.tensors
        if each.name in WANTED
    ]
    pieces = {at // PIECE for at in chain(*used)}
    needed = [at for at in range(size) if at // PIECE in pieces]
    assert len(pieces) > 4
    assert len(needed) < size - 3 * PIECE
    return needed


def num_header(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def put(path, change):
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw) or raw)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 7])
def test_the_hashes_are_those_of_sha256sum(tmp_path, size):
    raw = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(raw)
    (pin,) = pin_files([tmp_path / "file"])
    assert pin.digest == hashlib.sha256(raw).hexdigest()
    if size <= PIECE:
        assert pin.pieces is None
        return
    parts = [raw[at : at + PIECE] for at in range(0, size, PIECE)]
    hashes = "".join(hashlib.sha256(part).hexdigest() for part in parts)
    assert pin.pieces == FilePieces(size, PIECE, hashes)


@pytest.mark.parametrize("num_files", [1, 3, 5000, 10000])
def test_all_files_together_have_no_more_pieces_than_a_manifest_holds(num_files):
    for size in (1, PIECE, 100 * PIECE, 10**6, 10**12):
        piece = file_pieces.piece_bytes_of(size, num_files)
        count = -(-size // piece)
        assert piece % PIECE == 0
        assert count == 1 or count * num_files <= file_pieces.MAX_PIECES
        assert piece == PIECE or 2 * count > file_pieces.MAX_PIECES // num_files


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("wanted", ["abcde", "a", "e", "bd"])
def test_what_is_wanted_comes_as_it_is_stored_and_each_byte_once(
    path, monkeypatch, num_threads, wanted
):
    read, told = [], []

    def noting(file, where, block):
        read.append((file.tell(), file.tell() + len(block)))
        fill(file, where, block)

    monkeypatch.setattr(verified_file, "fill", noting)
    (pin,) = pin_files([path])
    found = load(path, pin, num_threads, wanted, progress=lambda *done: told.append(done))
    stored = load_file(path)
    for name, array in found.items():
        np.testing.assert_array_equal(array, stored[name])
    assert all(end <= start for (_, end), (start, _) in pairwise(read))
    if wanted == "bd":
        assert len(needed_bytes(path)) == num_header(path) + sum(end - at for at, end in read)
    assert told[-1] == (path.stat().st_size,) * 2


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_changed_byte_is_refused_by_its_place_unless_nobody_needs_its_piece(path, num_threads):
    (pin,) = pin_files([path])
    needed, stored = {*needed_bytes(path)}, load_file(path)
    begin = num_header(path)
    for at in range(0, path.stat().st_size, 11):
        put(path, lambda raw, at=at: raw.__setitem__(at, raw[at] ^ 1))
        if at in needed:
            # a header that is none is refused as such
            first = at // PIECE * PIECE
            last = min(first + PIECE, path.stat().st_size) - 1
            told = str(path) if at < begin else f"{path}, bytes {first} to {last}, has"
            with pytest.raises(ModelError, match=told):
                load(path, pin, num_threads) if at >= begin else load_header(path, pin)
        else:
            for name, array in load(path, pin, num_threads).items():
                np.testing.assert_array_equal(array, stored[name])
        put(path, lambda raw, at=at: raw.__setitem__(at, raw[at] ^ 1))


def load_header(path, pin):
    """As `load`, of a file whose header may be none."""
    sinks = {"d": CopySink(np.zeros((1, 5), np.float32))}
    load_tensors(path.parent, sinks, expected_hashes=[pin.digest], pieces={pin.digest: pin.pieces})


def test_a_header_that_is_another_and_well_made_is_refused(path):
    (pin,) = pin_files([path])
    put(path, lambda raw: raw.replace(b'"b"', b'"x"').replace(b'"c"', b'"b"'))
    with pytest.raises(ModelError, match=r"shape|bytes 0 to 255, has SHA-256"):
        load_header(path, pin)
    put(path, lambda raw: raw.replace(b'"a"', b'"A"'))
    with pytest.raises(ModelError, match="bytes 0 to 255, has SHA-256"):
        load_header(path, pin)


def test_pieces_in_each_others_place_are_refused(path):
    (pin,) = pin_files([path])
    first, *_, last = sorted({at // PIECE for at in needed_bytes(path)} - {0, 1})

    def swap(raw):
        one, two = (slice(at * PIECE, (at + 1) * PIECE) for at in (first, last))
        raw[one], raw[two] = raw[two], raw[one]

    put(path, swap)
    with pytest.raises(ModelError, match=f"bytes {first * PIECE} to"):
        load(path, pin)


@pytest.mark.parametrize("change", [-PIECE, -1, 1, PIECE])
def test_another_length_is_refused(path, change):
    (pin,) = pin_files([path])
    size = path.stat().st_size
    other = pin._replace(pieces=pin.pieces._replace(file_bytes=size + change))
    with pytest.raises(ModelError, match=f"has {size} bytes, expected {size + change}"):
        load(path, other)
    put(path, lambda raw: raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(ModelError, match="truncated" if change < 0 else "too long"):
        load_header(path, pin)


def test_the_last_piece_is_verified_as_far_as_the_file_goes(path):
    (pin,) = pin_files([path])
    assert path.stat().st_size % PIECE
    put(path, lambda raw: raw.__setitem__(-1, raw[-1] ^ 1))
    with pytest.raises(ModelError, match=f"to {path.stat().st_size - 1}, has SHA-256"):
        load(path, pin, wanted="e")
    load(path, pin, wanted="b")


def test_a_list_of_another_files_pieces_is_refused_whatever_the_hash_of_the_whole(path):
    (pin,) = pin_files([path])
    hashes = pin.pieces.hashes
    other = pin._replace(pieces=pin.pieces._replace(hashes=hashes[64:] + hashes[:64]))
    with pytest.raises(ModelError, match="bytes 0 to 255, has SHA-256"):
        load(path, other)
    assert other.name != pin.name != pin._replace(pieces=None).name


def test_a_file_without_pieces_is_hashed_as_a_whole(path):
    sinks = {"d": CopySink(np.zeros((1, 5), np.float32))}
    (digest,) = hash_files([path])
    load_tensors(path.parent, sinks, expected_hashes=[digest], num_threads=2)
    put(path, lambda raw: raw.__setitem__(-1, raw[-1] ^ 1))
    with pytest.raises(ModelError, match=rf"{path} has SHA-256 .*, expected {digest}"):
        load_tensors(path.parent, sinks, expected_hashes=[digest], num_threads=2)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_sink_that_fails_ends_those_who_read_and_hash(path, num_threads):
    class FailingSink(CopySink):
        def write(self, first, rows):
            raise MemoryError

    (pin,) = pin_files([path])
    before = threading.active_count()
    with pytest.raises(MemoryError):
        load_tensors(
            path.parent, {"b": FailingSink(np.zeros((70, 5), np.float32))},
            expected_hashes=[pin.digest], pieces={pin.digest: pin.pieces}, num_threads=num_threads,
        )  # fmt: skip
    assert threading.active_count() <= before


@pytest.mark.parametrize("blocks", [[(0, 4)], [(4, 8)], [(0, 4), (5, 8)], [(0, 4), (8, 16)]])
def test_a_piece_that_does_not_go_by_as_a_whole_is_never_verified(tmp_path, blocks):
    raw = bytes(16)
    pieces = FilePieces(16, 8, 2 * hashlib.sha256(raw[:8]).hexdigest())
    check = PieceCheck(tmp_path, pieces, 0, 1)

    def go_by():
        for start, end in blocks:
            check.update(start, memoryview(raw[start:end]))
        check.finish()

    with pytest.raises(ModelError, match="not read as a whole"):
        go_by()


@pytest.mark.parametrize("new_size", [0, 999_999, 1_000_001, 2_000_000])
def test_a_file_that_changes_while_it_is_hashed_is_not_pinned(tmp_path, new_size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1_000_000))

    def change(*_):
        os.truncate(path, new_size)

    with pytest.raises(ModelError, match="changed while it was read"):
        pin_files([path], change)
