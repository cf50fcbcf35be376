"""Records authenticate whole and in order, on schedule, within their limits."""

import contextlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport import records
from transport.cipher import AEADS, CipherState
from transport.errors import MisuseError, ProtocolError, RecordError
from transport.records import RecordKind
from transport.rekey_policy import RekeyPolicy

KEY = bytes(range(32))
FRAME = RecordKind.FRAME


def make_pair(policy=None, receiving_policy=None):
    policy = policy or RekeyPolicy()
    aead = AEADS["ChaChaPoly"]
    return (
        records.RecordSealer(CipherState(aead, KEY), policy),
        records.RecordOpener(CipherState(aead, KEY), receiving_policy or policy),
    )


@pytest.mark.parametrize("size", [1, 100, 65_536, records.MAX_PLAINTEXT_BYTES])
def test_a_record_opens_to_what_was_sealed(size):
    sealer, opener = make_pair()
    record = sealer.seal(FRAME, b"x" * size)
    assert len(record) == size + records.OVERHEAD_BYTES
    assert opener.open(record) == (FRAME, b"x" * size)


def test_the_bytes_of_a_record_are_those_of_the_specification():
    sealer, _ = make_pair()
    record = sealer.seal(FRAME, b"abc")
    assert record[:8] == bytes([2, 0, 0, 0, 0, 0, 0, 19])
    assert record[8:] == AEADS["ChaChaPoly"].make(KEY).encrypt(bytes(12), b"abc", record[:8])
    assert sealer.seal(FRAME, b"abc")[8:] == AEADS["ChaChaPoly"].make(KEY).encrypt(
        bytes(4) + (1).to_bytes(8, "little"), b"abc", record[:8]
    )


def test_flipping_any_bit_of_a_record_is_refused_and_wipes_the_plaintext():
    sealer, _ = make_pair()
    record = sealer.seal(FRAME, b"secret activations")
    for bit in range(8 * len(record)):
        altered = bytearray(record)
        altered[bit // 8] ^= 1 << (bit % 8)
        _, opener = make_pair()
        with pytest.raises(RecordError):
            opener.open(bytes(altered))
    _, opener = make_pair()
    header = records.parse_header_untrusted(record[:8])
    out = bytearray(b"?" * header.plaintext_bytes)
    with pytest.raises(RecordError):
        opener.open_into(header, bytes(altered[8:]), memoryview(out))
    assert out == bytes(header.plaintext_bytes)


@pytest.mark.parametrize("order", [(1,), (0, 0), (0, 2), (0, 1, 0)])
def test_a_record_out_of_its_place_is_refused(order):
    sealer, opener = make_pair()
    sealed = [sealer.seal(FRAME, bytes([number])) for number in range(3)]
    *before, last = order
    for number in before:
        opener.open(sealed[number])
    with pytest.raises(RecordError, match="does not authenticate"):
        opener.open(sealed[last])


def test_nothing_opens_after_a_failure():
    sealer, opener = make_pair()
    good = sealer.seal(FRAME, b"good")
    with pytest.raises(RecordError):
        opener.open(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(MisuseError):
        opener.open(good)


@pytest.mark.parametrize("policy", [RekeyPolicy(max_records=4), RekeyPolicy(max_bytes=40)])
def test_keys_change_on_schedule_and_both_sides_follow(policy):
    sealer, opener = make_pair(policy)
    num_opened = 0
    kinds = []
    for number in range(13):
        stream = sealer.seal(FRAME, bytes([number]) * 10)
        while stream:
            size = records.HEADER_BYTES + int.from_bytes(stream[4:8], "big")
            kind, plaintext = opener.open(stream[:size])
            kinds.append(kind)
            num_opened += plaintext == bytes([number]) * 10
            stream = stream[size:]
    assert num_opened == 13
    assert [n for n, kind in enumerate(kinds) if kind is RecordKind.REKEY] == [4, 9, 14]
    assert sealer.num_rekeys == opener.num_rekeys == 3


def test_a_key_used_beyond_the_schedule_is_refused():
    sealer, opener = make_pair(RekeyPolicy(), RekeyPolicy(max_records=2))
    for _ in range(2):
        opener.open(sealer.seal(FRAME, b"x"))
    with pytest.raises(RecordError, match="due for replacement"):
        opener.open(sealer.seal(FRAME, b"x"))


def test_a_key_replaced_before_use_is_refused():
    sealer, opener = make_pair()
    with pytest.raises(RecordError, match="before it was used"):
        opener.open(sealer.seal(RecordKind.REKEY))


def test_an_old_key_opens_nothing_after_a_rekey():
    sealer, opener = make_pair(RekeyPolicy(max_records=1))
    opener.open(sealer.seal(FRAME, b"x"))
    rekey = sealer.seal(FRAME, b"y")[: records.OVERHEAD_BYTES]
    opener.open(rekey)
    old_key = CipherState(AEADS["ChaChaPoly"], KEY)
    old_key.nonce = 2
    header = records.HEADER.pack(FRAME << 24, 17)
    with pytest.raises(RecordError):
        opener.open(header + old_key.encrypt(header, b"z"))


@pytest.mark.parametrize(
    ("kind", "size"), [(0, 20), (6, 20), (255, 20), (1, 17), (4, 17), (5, 32), (2, 16), (3, 0)]
)
def test_a_header_outside_the_limits_is_refused(kind, size):
    with pytest.raises(RecordError):
        records.parse_header_untrusted(bytes([kind, 0, 0, 0]) + size.to_bytes(4, "big"))


def test_sealing_more_than_a_record_holds_is_misuse():
    sealer, _ = make_pair()
    with pytest.raises(MisuseError):
        sealer.seal(FRAME, bytes(records.MAX_PLAINTEXT_BYTES + 1))


@given(raw=st.binary(min_size=8, max_size=8))
def test_arbitrary_headers_raise_protocol_errors_only(raw):
    try:
        header = records.parse_header_untrusted(raw)
    except ProtocolError:
        return
    assert 0 <= header.plaintext_bytes <= records.MAX_PLAINTEXT_BYTES


@given(stream=st.binary(max_size=300), cuts=st.lists(st.integers(1, 50), max_size=10))
def test_arbitrary_streams_raise_protocol_errors_only(stream, cuts):
    _, opener = make_pair()
    reader = records.RecordReader(opener)
    rest = stream
    with contextlib.suppress(ProtocolError):
        for cut in [*cuts, len(stream)]:
            piece, rest = rest[:cut], rest[cut:]
            reader.space()[: len(piece)] = piece
            reader.wrote(len(piece))
            while (record := reader.ready_untrusted()) is not None:
                reader.open_into(memoryview(bytearray(record.plaintext_bytes)))


@given(
    sizes=st.lists(st.sampled_from([1, 30, 3000, 60_000, 200_000, 524_288]), max_size=6),
    reads=st.lists(st.sampled_from([1, 7, 24, 5000, 70_000, 600_000]), min_size=1, max_size=8),
)
def test_records_survive_any_division_of_the_stream(sizes, reads):
    sealer, opener = make_pair()
    stream = memoryview(b"".join(sealer.seal(FRAME, b"x" * size) for size in sizes))
    reader = records.RecordReader(opener)
    opened = []
    number = 0
    while stream:
        space = reader.space()
        assert len(space) > 0
        size = min(len(stream), len(space), max(reads[number % len(reads)], 1 + len(stream) // 99))
        space[:size] = stream[:size]
        reader.wrote(size)
        stream = stream[size:]
        number += 1
        while (record := reader.ready_untrusted()) is not None:
            out = bytearray(record.plaintext_bytes)
            reader.open_into(memoryview(out))
            opened.append(len(out))
    assert opened == sizes
    assert reader.is_empty


def test_a_declared_size_allocates_nothing_before_its_bytes_arrive():
    sealer, opener = make_pair()
    record = sealer.seal(FRAME, bytes(records.MAX_PLAINTEXT_BYTES))
    reader = records.RecordReader(opener)
    tracemalloc.start()
    try:
        sent = 0
        while sent < 60_000:
            size = min(len(reader.space()), 1000)
            reader.space()[:size] = record[sent : sent + size]
            reader.wrote(size)
            sent += size
            assert reader.ready_untrusted() is None
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 4096
        while sent < len(record):
            size = min(len(reader.space()), len(record) - sent)
            reader.space()[:size] = record[sent : sent + size]
            reader.wrote(size)
            sent += size
            reader.ready_untrusted()
            assert tracemalloc.get_traced_memory()[0] <= max(2 * sent, 4096) + 64 * 1024
    finally:
        tracemalloc.stop()
    assert reader.ready_untrusted() is not None
