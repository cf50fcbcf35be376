"""Parts by their hash: whole ones only, within the quota, and gone when they are to be."""

import errno
import hashlib
import io

import pytest

from pipeline.machines.part_store import PARTIAL, PartRefused, PartStore

DATA = bytes(range(256)) * 100
DIGEST = hashlib.sha256(DATA).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def store(tmp_path):
    return PartStore(tmp_path / "parts", 100_000)


def put(store, data=DATA, digest=DIGEST):
    with store.begin(digest, len(data)) as upload:
        upload.write(memoryview(data)[upload.offset :])
        assert upload.is_whole()
        upload.finish()


def test_a_part_is_there_when_all_of_it_is(store, tmp_path):
    with store.begin(DIGEST, len(DATA)) as upload:
        upload.write(memoryview(DATA)[:1000])
        assert not store.has(DIGEST)
    assert store.parts() == []
    with store.begin(DIGEST, len(DATA)) as upload:
        assert upload.offset == 1000
    put(store)
    assert store.path(DIGEST).read_bytes() == DATA
    assert [(each.digest, each.num_bytes) for each in store.parts()] == [(DIGEST, len(DATA))]
    assert not list((tmp_path / "parts").glob(f"*{PARTIAL}"))
    assert [each.digest for each in PartStore(tmp_path / "parts", None).parts()] == [DIGEST]


def test_what_has_another_hash_is_dropped_whole(store):
    with pytest.raises(PartRefused, match="another hash"):
        put(store, digest=OTHER)
    assert not store.has(OTHER)
    with store.begin(OTHER, 5) as upload:
        assert upload.offset == 0


def test_a_beginning_that_is_of_something_else_does_not_spoil_the_next_try(store, tmp_path):
    (tmp_path / "parts" / (DIGEST + PARTIAL)).write_bytes(b"x" * 1000)
    with pytest.raises(PartRefused, match="another hash"):
        put(store)
    put(store)
    (tmp_path / "parts" / (OTHER + PARTIAL)).write_bytes(b"x" * 1000)
    put(store, b"other", OTHER)  # longer than the part is


def test_a_quota_counts_what_is_there_and_what_is_coming(store):
    with pytest.raises(PartRefused, match=r"do not fit.*--remove-unused"):
        store.begin(DIGEST, 100_001)
    with store.begin(DIGEST, 60_000) as upload:
        upload.write(memoryview(DATA))
        assert store.free_bytes() == 40_000
        with pytest.raises(PartRefused, match="do not fit"):
            store.begin(OTHER, 50_000)
    put(store)
    assert store.free_bytes() == 100_000 - len(DATA)


def test_no_part_is_taken_twice_at_once_or_beyond_its_size(store):
    with store.begin(DIGEST, len(DATA)) as upload:
        with pytest.raises(PartRefused, match="somebody else"):
            store.begin(DIGEST, len(DATA))
        with pytest.raises(PartRefused, match="announced"):
            upload.write(memoryview(DATA + b"x"))
        with pytest.raises(PartRefused, match="in use"):
            store.remove([DIGEST])


def test_parts_are_removed_unless_they_are_used(store):
    put(store)
    with pytest.raises(PartRefused, match="in use"):
        store.remove([DIGEST], kept={DIGEST})
    store.remove([DIGEST, OTHER])
    assert store.parts() == []


def test_a_full_disk_is_a_reason_and_no_crash(store, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    with store.begin(DIGEST, len(DATA)) as upload:
        upload._file.close()
        upload._file = Full()
        with pytest.raises(PartRefused, match="No space left"):
            upload.write(memoryview(DATA))
    put(store)
