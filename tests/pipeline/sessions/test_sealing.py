"""What comes out of a seal is what went in, or an error: whatever a store has done to it."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pipeline.errors import StateRefused
from pipeline.kernels.kv_storage import LayerKV
from pipeline.sessions.kv_store import StoreLimits
from pipeline.sessions.sealed_session import SealedSession
from pipeline.sessions.sealing import CHUNK_POSITIONS, Cipher, Place, Seal, is_same
from pipeline.sessions.sqlite_store import SqliteStore

KEY = bytes(range(32))
PLACE = Place(b"s" * 32, b"c" * 32, 2, 5, "int8", "native avx512_vnni")
NUM_LAYERS = 3


def random_layers(num_positions, seed=0, dtype=FLOAT16):
    generator = np.random.default_rng(seed)
    shape = (NUM_LAYERS, 2, 2, num_positions, 8)
    raw = generator.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return [LayerKV(*both) for both in raw.view(dtype)[..., 0]]


def are_equal(layers, expected):
    return all(
        one.tobytes() == other.tobytes() and one.dtype == other.dtype and one.shape == other.shape
        for layer, other_layer in zip(layers, expected, strict=True)
        for one, other in zip(layer, other_layer, strict=True)
    )


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_opened_layers_are_those_that_were_sealed_bit_for_bit(cipher, dtype):
    seal = Seal(KEY, PLACE, cipher)
    layers = random_layers(7, dtype=dtype)
    chunk, mark = seal.seal(seal.start, 1, layers)
    found, end = seal.open(seal.start, 1, chunk)
    assert are_equal(found, layers)
    assert mark.position == 7
    assert is_same(end, mark)


def test_no_two_seals_of_the_same_layers_are_alike():
    seal = Seal(KEY, PLACE)
    chunks = [seal.seal(seal.start, 1, random_layers(7))[0] for _ in range(2)]
    blobs = [blob for chunk in chunks for blob in chunk]
    assert len({blob[32:64] for blob in blobs}) == len(blobs)
    assert random_layers(7)[0].keys.tobytes()[:16] not in b"".join(blobs)


OTHERS = {
    "session": {"session": b"t" * 32},
    "core": {"core_hash": b"d" * 32},
    "layers": {"layer_start": 3, "layer_end": 6},
    "precision": {"precision": "float32"},
    "kernels": {"kernels": "torch"},
    "window": {"window": "1024 + 4 sinks"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_place_is_refused(other):
    seal, foreign = Seal(KEY, PLACE), Seal(KEY, replace(PLACE, **other))
    chunk, _ = foreign.seal(seal.start, 1, random_layers(7))
    with pytest.raises(StateRefused):
        seal.open(seal.start, 1, chunk)
    assert foreign.start != seal.start


def test_a_state_under_another_key_is_refused():
    seal = Seal(KEY, PLACE)
    chunk, _ = Seal(bytes(32), PLACE).seal(seal.start, 1, random_layers(7))
    with pytest.raises(StateRefused):
        seal.open(seal.start, 1, chunk)


def test_a_state_of_a_later_epoch_is_refused():
    seal = Seal(KEY, PLACE)
    chunk, _ = seal.seal(seal.start, 2, random_layers(7))
    seal.open(seal.start, 2, chunk)
    with pytest.raises(StateRefused):
        seal.open(seal.start, 1, chunk)


def test_each_bit_of_a_blob_counts():
    seal = Seal(KEY, PLACE)
    chunk, _ = seal.seal(seal.start, 1, random_layers(1))
    for place in [*range(64), *range(64, len(chunk[1]), 37)]:
        blob = bytearray(chunk[1])
        blob[place] ^= 1 << place % 8
        with pytest.raises(StateRefused):
            seal.open(seal.start, 1, [chunk[0], bytes(blob), chunk[2]])


def test_every_length_of_a_blob_but_its_own_is_refused():
    seal = Seal(KEY, PLACE)
    chunk, _ = seal.seal(seal.start, 1, random_layers(1))
    for length in range(len(chunk[0])):
        with pytest.raises(StateRefused):
            seal.open(seal.start, 1, [chunk[0][:length], *chunk[1:]])
    with pytest.raises(StateRefused):
        seal.open(seal.start, 1, [chunk[0] + b"\0", *chunk[1:]])


def rearranged(chunks):
    (one, *_), (other, *_) = chunks
    yield "layers swapped", [[chunks[0][1], chunks[0][0], chunks[0][2]], chunks[1]]
    yield "a layer left out", [chunks[0][:2], chunks[1]]
    yield "a layer twice", [[*chunks[0], chunks[0][2]], chunks[1]]
    yield "chunks swapped", chunks[::-1]
    yield "a chunk twice", [chunks[0], chunks[0]]
    yield "a layer of another chunk", [[other, *chunks[0][1:]], [one, *chunks[1][1:]]]
    yield "nothing", [[], []]


def test_what_has_been_rearranged_is_refused():
    seal = Seal(KEY, PLACE)
    first, mark = seal.seal(seal.start, 1, random_layers(7))
    second, _ = seal.seal(mark, 1, random_layers(7, seed=1))
    for _, chunks in rearranged([list(first), list(second)]):
        with pytest.raises(StateRefused):
            open_all(seal, chunks)


def open_all(seal, chunks):
    mark = seal.start
    for chunk in chunks:
        _, mark = seal.open(mark, 1, chunk)


class Slot:
    """What a slot holds, as a cache keeps it."""

    def __init__(self):
        self.layers = None

    def restore(self, position, layers):
        held = 0 if self.layers is None else self.layers[0].keys.shape[1]
        assert position == held
        parts = [layers] if self.layers is None else [self.layers, layers]
        self.layers = [
            LayerKV(*(np.concatenate(arrays, axis=1) for arrays in zip(*each, strict=True)))
            for each in zip(*parts, strict=True)
        ]


def cut(layers, positions):
    inside = slice(positions.start, positions.stop)
    return [LayerKV(keys[:, inside], values[:, inside]) for keys, values in layers]


@pytest.fixture
def store():
    store = SqliteStore(None, StoreLimits())
    yield store
    store.close()


@pytest.fixture
def session(store):
    return SealedSession(store, KEY, PLACE)


async def save(session, layers, marks, num_kept=0, epoch=1):
    """Goes on behind the first chunks; all marks then."""
    before = marks[num_kept - 1] if num_kept else session.start
    end = layers[0].keys.shape[1]
    return [
        *marks[:num_kept],
        *await session.save(epoch, num_kept, before, end, lambda part: cut(layers, part)),
    ]


async def load(session, marks, length=None, epoch=9):
    slot = Slot()
    length = marks[-1].position if length is None else length
    await session.load(epoch, len(marks), marks[-1], length, slot.restore)
    return slot.layers


async def test_a_session_goes_on_where_it_was_saved(session):
    layers = random_layers(3 * CHUNK_POSITIONS + 5)
    marks = await save(session, cut(layers, range(CHUNK_POSITIONS + 9)), [])
    marks = await save(session, layers, marks, len(marks), epoch=2)
    assert [mark.position for mark in marks] == [
        CHUNK_POSITIONS, CHUNK_POSITIONS + 9, 2 * CHUNK_POSITIONS + 9, 3 * CHUNK_POSITIONS + 5
    ]  # fmt: skip
    assert are_equal(await load(session, marks), layers)


async def test_as_much_of_a_session_is_loaded_as_is_wanted(session):
    layers = random_layers(2 * CHUNK_POSITIONS)
    marks = await save(session, layers, [])
    for length in (1, CHUNK_POSITIONS - 1, CHUNK_POSITIONS, CHUNK_POSITIONS + 1):
        assert are_equal(await load(session, marks, length), cut(layers, range(length)))


async def test_saving_writes_new_positions_only(session, store):
    layers = random_layers(2 * CHUNK_POSITIONS)
    marks = await save(session, cut(layers, range(2 * CHUNK_POSITIONS - 1)), [])
    (before,) = await store.sessions()
    await save(session, layers, marks, len(marks))
    (after,) = await store.sessions()
    assert after.num_bytes - before.num_bytes < 2 * before.num_bytes // CHUNK_POSITIONS


async def test_a_save_that_home_never_heard_of_does_no_harm(session):
    layers, others = random_layers(40), random_layers(50, seed=1)
    marks = await save(session, cut(layers, range(30)), [])
    await save(session, layers, marks, 1)
    assert are_equal(await load(session, marks), cut(layers, range(30)))
    beginning = Slot()
    beginning.restore(0, cut(layers, range(30)))
    beginning.restore(30, cut(others, range(30, 50)))
    again = await save(session, beginning.layers, marks, 1)
    assert are_equal(await load(session, again), beginning.layers)


async def test_an_older_state_put_back_is_refused(session, store):
    name = PLACE.name
    marks = await save(session, random_layers(30), [])
    older = await store.read(name, 0)
    newer = await save(session, random_layers(30, seed=1), [], epoch=2)
    await store.write(name, 0, older)
    with pytest.raises(StateRefused, match="is not what was stored last"):
        await load(session, newer)
    assert await load(session, marks)


async def test_a_state_that_has_lost_its_end_is_refused(session, store):
    marks = await save(session, random_layers(2 * CHUNK_POSITIONS), [])
    await store.write(PLACE.name, 0, await store.read(PLACE.name, 0))
    with pytest.raises(StateRefused, match=f"from position {CHUNK_POSITIONS} on is gone"):
        await load(session, marks)


async def test_a_state_that_is_gone_is_refused(session):
    marks = await save(session, random_layers(30), [])
    await session.forget()
    with pytest.raises(StateRefused, match="from position 0 on is gone"):
        await load(session, marks)
