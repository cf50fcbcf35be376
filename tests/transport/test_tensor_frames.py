"""Frames arrive as they were sent; whatever else a peer declares is refused before it costs."""

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import frame_stream, tensor_frames
from transport.errors import FrameError, MisuseError, ProtocolError, RecordError
from transport.records import RecordKind
from transport.rekey_policy import RekeyPolicy
from transport.tensor_frames import DType, Frame, FrameKind, FrameLimits, Tensor, TensorSpec


class Pipe:
    """A sender and a receiver with the wire between them in the test's hand."""

    def __init__(self, toy, limits=None, rekey=None):
        sender, receiver, _ = toy.sessions(rekey=rekey)
        self.sealer = sender.sealer
        self.sender = frame_stream.FrameSender(sender.sealer)
        self.receiver = frame_stream.FrameReceiver(receiver.opener, limits or toy.LIMITS)

    def sealed(self, frame):
        data, pieces = self.sender.begin(frame)
        parts = [bytes(data)]
        parts += [bytes(self.sender.seal_piece(piece)) for piece in pieces]
        return b"".join(parts)

    def feed(self, stream, max_read=1 << 20):
        stream = memoryview(stream)
        while True:
            frame = self.receiver.next_frame_untrusted()
            if frame is not None or not stream:
                return frame
            space = self.receiver.space()
            size = min(len(space), len(stream), max_read)
            space[:size] = stream[:size]
            self.receiver.wrote(size)
            stream = stream[size:]

    def feed_record(self, plaintext, kind=RecordKind.FRAME):
        return self.feed(self.sealer.seal(kind, plaintext))


def head(tensors=(), header=b"", kind=2):
    specs = b"".join(
        struct.pack(f">BB{len(shape)}I", dtype, len(shape), *shape) for dtype, shape in tensors
    )
    return struct.pack(">BBI", kind, len(tensors), len(header)) + specs + header


SHAPES = [(), (0,), (5,), (1, 768), (3, 0, 7), (1, 1, 1, 1, 1, 1, 1, 2)]


def some_tensor(dtype, shape):
    spec = TensorSpec(dtype, shape)
    return Tensor(spec, memoryview(bytes(index % 251 for index in range(spec.nbytes))))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DType)
def test_every_dtype_and_shape_survives(toy, dtype, shape):
    sent = Frame(FrameKind.DATA, b"head", (some_tensor(dtype, shape), some_tensor(dtype, (3,))))
    pipe = Pipe(toy)
    assert toy.contents(pipe.feed(pipe.sealed(sent))) == toy.contents(sent)


@pytest.mark.parametrize(
    "sizes",
    [(), (0,), (1, 1), (65_480,), (65_536,), (65_537,), (262_144,), (262_145, 0, 3, 600_000)],
    ids=str,
)
def test_frames_of_every_layout_survive_one_after_the_other(toy, sizes):
    pipe = Pipe(toy)
    for header in (b"", b"h", b"x" * 100_000):
        sent = toy.frame(*sizes, header=header)
        assert toy.contents(pipe.feed(pipe.sealed(sent))) == toy.contents(sent)
        assert pipe.receiver.is_idle


@settings(max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 15, 16, 3072, 70_000, 300_000]), max_size=4),
    max_read=st.sampled_from([1000, 4096, 100_000, 1 << 20]),
    max_records=st.sampled_from([1, 2, 1000]),
)
def test_frames_survive_any_division_of_the_stream_and_any_rekeying(
    toy, sizes, max_read, max_records
):
    pipe = Pipe(toy, rekey=RekeyPolicy(max_records=max_records))
    for _ in range(2):
        sent = toy.frame(*sizes)
        assert toy.contents(pipe.feed(pipe.sealed(sent), max_read)) == toy.contents(sent)


def test_frames_laid_out_alike_share_views_of_the_storage_and_no_others(toy):
    pipe = Pipe(toy)
    layouts = [(3072,), (3072,), (5, 7), (3072,), (700_000,), (3072,), (700_000,), (700_001,)]
    previous = None
    for sizes in layouts:
        sent = toy.frame(*sizes)
        received = pipe.feed(pipe.sealed(sent))
        assert toy.contents(received) == toy.contents(sent)
        assert all(t.data.obj is received.tensors[0].data.obj for t in received.tensors)
        is_alike = previous is not None and previous[0] == sizes
        assert is_alike == (previous is not None and previous[1] is received.tensors)
        previous = sizes, received.tensors


def test_a_small_frame_is_one_record(toy):
    pipe = Pipe(toy)
    stream = pipe.sealed(toy.frame(3072))
    assert stream[0] == RecordKind.FRAME
    assert len(stream) == 8 + int.from_bytes(stream[4:8], "big")


def test_tensors_are_aligned_in_their_storage(toy):
    pipe = Pipe(toy)
    for sizes in ((3, 5, 64), (3, 70_001, 64)):
        frame = pipe.feed(pipe.sealed(toy.frame(*sizes)))
        base = frame.tensors[0].data.obj
        assert all(t.data.obj is base for t in frame.tensors)
        import ctypes

        address = ctypes.addressof(ctypes.c_char.from_buffer(frame.tensors[2].data))
        assert address % tensor_frames.ALIGNMENT == 0


BAD_HEADS = {
    "empty head": b"\2",
    "unknown frame kind": head(kind=9),
    "unknown dtype": head([(99, (1,))]) + bytes(4),
    "specs missing": head([(1, (1,))])[:8],
    "too many dimensions": struct.pack(">BBIBB", 2, 1, 0, 5, 9) + bytes(36 + 100),
    "too many tensors": head([(5, (0,))] * 9),
    "header longer than the record": struct.pack(">BBI", 2, 0, 100) + b"short",
    "header over the limit": struct.pack(">BBI", 2, 0, (1 << 17) + 1) + bytes((1 << 17) + 1),
    "bytes after the header": head(header=b"x") + b"y",
    "tensor missing": head([(5, (10,))]),
    "tensor cut": head([(5, (10,))]) + bytes(13),
    "tensor too long": head([(5, (2,))]) + bytes(20),
    "padding not zero": head([(5, (2,))]) + b"\0\1\0\0" + bytes(2),
    "tensors over the limit": head([(5, ((1 << 26) + 1,))]),
    "size beyond 64 bits": head([(8, (2**32 - 1,) * 8)]),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_malformed_head_is_refused(toy, name):
    with pytest.raises(FrameError):
        Pipe(toy).feed_record(BAD_HEADS[name])


def test_the_head_used_above_is_good_when_it_is_not_bad(toy):
    good = head([(5, (2,))], b"h")
    frame = Pipe(toy).feed_record(good + bytes(-len(good) % 16) + b"ab")
    assert (frame.header, bytes(frame.tensors[0].data)) == (b"h", b"ab")


def test_the_check_sees_header_and_specs_before_any_body_and_its_refusal_counts(toy):
    seen = []

    def check(header, specs):
        seen.append((header, specs))
        if header == b"bad":
            raise FrameError("not this one")

    limits = FrameLimits(100, 4, 1 << 26, check)
    pipe = Pipe(toy, limits)
    good = toy.frame(10, 200_000, header=b"good")
    pipe.feed(pipe.sealed(good))
    with pytest.raises(FrameError, match="not this one"):
        pipe.feed(pipe.sealed(toy.frame(1_000_000, header=b"bad"))[:200])
    assert seen[0] == (b"good", tuple(tensor.spec for tensor in good.tensors))
    assert len(seen) == 2


@pytest.mark.parametrize("kind", [RecordKind.FRAME, RecordKind.CLOSE, RecordKind.ACCEPT])
def test_another_record_inside_a_frame_is_refused(toy, kind):
    pipe = Pipe(toy)
    assert pipe.feed_record(head([(5, (100_000,))])) is None
    with pytest.raises(RecordError, match="inside a frame"):
        pipe.feed_record(b"x" if kind is RecordKind.FRAME else b"", kind)


@pytest.mark.parametrize("kind", [RecordKind.BODY, RecordKind.ACCEPT])
def test_a_record_that_belongs_elsewhere_is_refused_between_frames(toy, kind):
    with pytest.raises(RecordError, match="between frames"):
        Pipe(toy).feed_record(b"x" if kind is RecordKind.BODY else b"", kind)


@pytest.mark.parametrize("size", [1, 99_999, 100_001, 300_000])
def test_a_piece_of_another_size_than_due_is_refused(toy, size):
    pipe = Pipe(toy)
    assert pipe.feed_record(head([(5, (100_000,))])) is None
    with pytest.raises(RecordError, match="100000 are due"):
        pipe.feed_record(bytes(size), RecordKind.BODY)


def test_close_ends_the_stream_of_frames(toy):
    pipe = Pipe(toy)
    assert pipe.feed(bytes(pipe.sender.close())) is None
    assert pipe.receiver.is_ended


@pytest.mark.parametrize(
    "frame",
    [
        Frame(FrameKind.DATA, bytes(tensor_frames.MAX_HEADER_BYTES + 1)),
        Frame(FrameKind.DATA, b"", (some_tensor(DType.U8, (0,)),) * 256),
        Frame(FrameKind.DATA, b"", (Tensor(TensorSpec(DType.F32, (2,)), memoryview(b"1234")),)),
        Frame(FrameKind.DATA, b"", (Tensor(TensorSpec(DType.U8, (1,) * 9), memoryview(b"1")),)),
        Frame(FrameKind.DATA, b"", (Tensor(TensorSpec(DType.U8, (2**32, 0)), memoryview(b"")),)),
        Frame(
            FrameKind.DATA,
            b"",
            (Tensor(TensorSpec(DType.U8, (2,)), memoryview(b"1234")[::2]),),
        ),
    ],
    ids=["header", "count", "size", "dims", "dim", "strided"],
)
def test_a_frame_that_cannot_travel_is_misuse_and_seals_nothing(toy, frame):
    pipe = Pipe(toy)
    with pytest.raises(MisuseError):
        pipe.sealed(frame)
    good = toy.frame(5)
    assert toy.contents(pipe.feed(pipe.sealed(good))) == toy.contents(good)


@given(plain=st.binary(min_size=1, max_size=200))
def test_arbitrary_heads_raise_protocol_errors_only(toy, plain):
    try:
        layout = tensor_frames.decode_layout_untrusted(memoryview(plain), toy.LIMITS)
    except ProtocolError:
        return
    assert layout.storage_bytes <= toy.LIMITS.max_tensor_bytes + len(plain) + 16 * 8


@given(
    records=st.lists(
        st.tuples(st.sampled_from(list(RecordKind)), st.binary(min_size=1, max_size=100)),
        max_size=5,
    )
)
def test_arbitrary_authentic_records_raise_protocol_errors_only(toy, records):
    pipe = Pipe(toy)
    full = (RecordKind.FRAME, RecordKind.BODY)
    try:
        for kind, plaintext in records:
            pipe.feed_record(plaintext if kind in full else b"", kind)
    except ProtocolError:
        pass


def test_a_declared_tensor_allocates_nothing_before_its_bytes_arrive(toy):
    limits = FrameLimits(100, 1, 1 << 40)
    pipe = Pipe(toy, limits)
    plaintext = head([(5, (4_000_000_000,))])
    records = [pipe.sealer.seal(RecordKind.FRAME, plaintext)]
    records += [
        pipe.sealer.seal(RecordKind.BODY, bytes(tensor_frames.PIECE_BYTES)) for _ in range(8)
    ]
    tracemalloc.start()
    try:
        pipe.feed(records[0])
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024
        received = 0
        for record in records[1:]:
            pipe.feed(record[:-1])
            pipe.feed(record[-1:])
            received += len(record)
            buffer_bytes = 512 * 1024 + 64
            assert tracemalloc.get_traced_memory()[0] <= 2 * received + buffer_bytes
    finally:
        tracemalloc.stop()


def test_the_steady_state_allocates_no_storage(toy):
    pipe = Pipe(toy)
    streams = [pipe.sealed(toy.frame(1_500_000)) for _ in range(4)]
    pipe.feed(streams[0])
    pipe.feed(streams[1])
    tracemalloc.start()
    try:
        pipe.feed(streams[2])
        pipe.feed(streams[3])
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024
    finally:
        tracemalloc.stop()


@given(st.lists(st.integers(0, 40), max_size=3), st.binary(max_size=20))
def test_a_form_is_its_frame_and_says_where_header_and_tensors_lie(toy, sizes, header):
    frame = toy.frame(*sizes, header=header)
    form = tensor_frames.FrameForm(frame)
    assert form.plain == tensor_frames.encode_frame(frame)[0]
    assert form.plain[form.header_start : form.header_stop] == header
    lying = [bytes(form.plain[start:stop]) for start, stop in form.places]
    assert lying == [bytes(tensor.data) for tensor in frame.tensors]


def test_a_form_is_for_one_record(toy):
    with pytest.raises(MisuseError, match="65536"):
        tensor_frames.FrameForm(toy.frame(70_000))
