"""Messages as protobuf encodes them."""

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from pipeline.doors.messages import (
    AttestRequest,
    AttestResponse,
    DoorError,
    InferRequest,
    InferResponse,
)
from pipeline.doors.protobuf import (
    decode_attest_request_untrusted,
    decode_attest_response_untrusted,
    decode_infer_request_untrusted,
    decode_infer_response_untrusted,
    encode,
)

FIELD = descriptor_pb2.FieldDescriptorProto
BYTES, INT64, STRING, INT32, FLOAT = (
    FIELD.TYPE_BYTES, FIELD.TYPE_INT64, FIELD.TYPE_STRING, FIELD.TYPE_INT32, FIELD.TYPE_FLOAT,
)  # fmt: skip
PROTO = {
    "InferRequest": {
        "cloaked_embedding": BYTES, "encrypted_session_key": BYTES, "nonce": BYTES, "shape": INT64,
        "dtype": STRING, "session_id": STRING, "max_new_tokens": INT32, "temperature": FLOAT,
    },
    "InferResponse": {
        "output": BYTES, "shape": INT64, "dtype": STRING, "tokens_processed": INT32,
        "error": STRING,
    },
    "AttestRequest": {"nonce": BYTES},
    "AttestResponse": {
        "public_key": BYTES, "core_hash": BYTES, "evidence_kind": STRING, "evidence": BYTES,
    },
}  # fmt: skip
DECODERS = {
    InferRequest: decode_infer_request_untrusted,
    InferResponse: decode_infer_response_untrusted,
    AttestRequest: decode_attest_request_untrusted,
    AttestResponse: decode_attest_response_untrusted,
}


def google_messages(*, packed):
    file = descriptor_pb2.FileDescriptorProto(
        name=f"door{packed}.proto", package="infemeral", syntax="proto3"
    )
    for name, fields in PROTO.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            label = FIELD.LABEL_REPEATED if field == "shape" else FIELD.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, type=kind, label=label)
            if field == "shape":
                added.options.packed = packed
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"infemeral.{name}"))
        for name in PROTO
    }


GOOGLE = {packed: google_messages(packed=packed) for packed in (True, False)}
int32 = st.integers(-(1 << 31), (1 << 31) - 1)
shapes = st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=16).map(tuple)
blobs, words = st.binary(max_size=300), st.text(st.characters(codec="utf-8"), max_size=40)
messages = st.one_of(
    st.builds(
        InferRequest, blobs, blobs, blobs, shapes, words, words, int32,
        st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    st.builds(InferResponse, blobs, shapes, words, int32, words),
    st.builds(AttestRequest, blobs),
    st.builds(AttestResponse, blobs, blobs, words, blobs),
)  # fmt: skip


@given(messages, st.booleans())
def test_googles_library_and_ours_read_each_other(message, packed):
    theirs = GOOGLE[packed][type(message).__name__]()
    theirs.ParseFromString(b"".join(encode(message)))
    for name in PROTO[type(message).__name__]:
        value = getattr(theirs, name)
        assert (tuple(value) if name == "shape" else value) == getattr(message, name)
    assert DECODERS[type(message)](theirs.SerializeToString()) == message


@given(st.binary(max_size=60), st.sampled_from(list(DECODERS)))
def test_any_bytes_are_read_or_refused(body, kind):
    try:
        DECODERS[kind](body)
    except DoorError:
        return
    GOOGLE[True][kind.__name__]().ParseFromString(body)


def test_a_later_protos_fields_are_skipped():
    body = b"".join(encode(AttestRequest(b"n" * 32)))
    later = b"\x78\x05" + b"\x7d1234" + b"\x7912345678" + b"\x7a\x03abc" + body
    assert decode_attest_request_untrusted(later).nonce == b"n" * 32


def test_byte_fields_are_no_copies():
    body = bytearray(b"".join(encode(InferRequest(b"x" * 100, b"", b"", (), "", ""))))
    request = decode_infer_request_untrusted(body)
    body[-1:] = b"y"
    assert bytes(request.cloaked_embedding) == b"x" * 99 + b"y"


@pytest.mark.parametrize(
    "body",
    [
        b"\x0a\xff\xff\xff\xff\x0f",  # 4 GiB that never come
        b"\x0a\x05abc",
        b"\x0b\x0c",  # a group
        b"\x2a\x01\xff",  # no UTF-8
        b"\x08\x01",  # a number where bytes belong
        b"\x22\x01\x80",
        b"\x25\x00\x00\x00\x00",  # a dimension of another type
        b"\x22\x11" + b"\x01" * 17,  # 17 dimensions
        b"\x45\x00\x00\xc0\x7f",  # NaN
        b"\x80" * 11,
        b"\x00\x01",
    ],
)
def test_what_is_no_request_is_refused_in_one_line(body):
    with pytest.raises(DoorError, match=r"^the message is no InferRequest: [^\n]+$"):
        decode_infer_request_untrusted(body)
