import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MessageError
from pipeline.protocol.batch import Segment
from pipeline.protocol.messages import (
    MAX_CONTROL_BYTES,
    Abort,
    Broken,
    Done,
    Failure,
    Health,
    Healthy,
    Init,
    Ready,
    Rewind,
    Shutdown,
    StageFigures,
    Start,
    Waiting,
    decode_message,
    encode_message,
)
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import (
    StageTiming,
    StepHeader,
    StepKind,
    decode_step,
    encode_step,
)

INIT = Init(
    epoch=bytes(16),
    stage_idx=1,
    activation_dtype="F32",
    hidden_dim=576,
    max_seq_len=2048,
    num_slots=4,
    max_step_tokens=516,
    data_out="127.0.0.1:9011",
    upstream_measurements={0: b"\1" * 48},
    downstream_measurements={},
)
FIGURES = StageFigures(**dict.fromkeys(StageFigures.model_fields, (1 << 64) - 1))
MESSAGES = [
    INIT,
    Ready(
        epoch=bytes(16),
        vocab_size=9,
        stage_idx=1,
        weight_bytes=1,
        kv_bytes=2,
        precision="float32",
        kernels="native",
        num_threads=1,
        device="cpu",
        keeps_activations=True,
        is_row_exact=True,
    ),
    Waiting(detail="for 127.0.0.1:9001"),
    Health(sequence=1),
    Healthy(sequence=1, figures=FIGURES),
    Start(request_id=1, slot=0),
    Done(request_id=1),
    Abort(request_id=1),
    Broken(epoch=bytes(16), side="upstream", detail="x"),
    Rewind(epoch=bytes(16), lengths=[0, 7], data_out="127.0.0.1:9011", replay_until=2),
    Failure(code="busy", detail="x"),
    Shutdown(),
]
HEADER = StepHeader(
    StepKind.STEP,
    7,
    (Segment(0, 5, 1), Segment(3, 0, 9)),
    (Want.TOKEN, Want.NOTHING),
    (StageTiming(1, 2, 3),),
)
REPLAY = StepHeader(StepKind.REPLAY, 7, (Segment(0, 5, 1),), (Want.NOTHING,), until=2)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.type)
def test_a_control_message_survives_the_wire(message):
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.type)
def test_every_truncated_control_message_is_refused(message):
    data = encode_message(message)
    for length in range(len(data)):
        with pytest.raises(MessageError):
            decode_message(data[:length])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", bytes(15)),
        ("stage_idx", -1),
        ("stage_idx", "1"),
        ("num_slots", 0),
        ("num_slots", 1 << 40),
        ("upstream_measurements", {32: b"\1" * 48}),
        ("upstream_measurements", {0: b"\1" * 47}),
        ("data_out", "x" * 2000),
        ("surprise", 1),
        ("type", "initialise"),
    ],
)
def test_a_field_out_of_range_is_refused(field, value):
    with pytest.raises(MessageError):
        decode_message(msgpack.packb({**INIT.model_dump(), field: value}))


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": []},
        {"lengths": [-1]},
        {"lengths": [0] * 1025},
        {"lengths": [1.5]},
        {"epoch": bytes(15)},
        {"replay_until": 0},
        {"replay_until": 256},
        {"data_out": "x" * 2000},
        {"data_out": 7},
    ],
)
def test_a_rewind_out_of_range_is_refused(change):
    rewind = Rewind(epoch=bytes(16), lengths=[3], data_out="127.0.0.1:9011").model_dump()
    with pytest.raises(MessageError):
        decode_message(msgpack.packb({**rewind, **change}))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.type)
def test_nil_is_taken_for_what_is_absent(message):
    assert decode_message(msgpack.packb(message.model_dump())) == message


def test_a_control_message_over_the_limit_is_refused():
    with pytest.raises(MessageError, match="limit"):
        decode_message(bytes(MAX_CONTROL_BYTES + 1))


@given(st.binary(max_size=512))
def test_any_bytes_are_a_control_message_or_a_message_error(data):
    try:
        decode_message(data)
    except MessageError:
        pass


@pytest.mark.parametrize("data", [b"\x81\x90\x00", b"\x81\x80\x00"], ids=["list", "map"])
def test_a_map_whose_key_is_a_collection_is_refused(data):
    with pytest.raises(MessageError):
        decode_message(data)


def test_deep_nesting_is_refused():
    with pytest.raises(MessageError):
        decode_message(b"\x91" * 10_000)


def test_a_step_header_survives_the_wire():
    assert decode_step(encode_step(HEADER)) == HEADER
    longer = HEADER.with_timing(StageTiming(4, 5, 6))
    assert decode_step(encode_step(longer)).timings[-1] == StageTiming(4, 5, 6)
    assert HEADER.num_tokens == 10
    assert decode_step(encode_step(REPLAY)) == REPLAY


def test_every_truncated_or_padded_step_header_is_refused():
    data = encode_step(HEADER)
    for wrong in [data[:length] for length in range(len(data))] + [data + b"\0"]:
        with pytest.raises(MessageError):
            decode_step(wrong)


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 1), (1, 0), (1, 9), (6, 1), (16 + 12, 7)], ids=str
)
def test_a_step_header_with_an_unknown_value_is_refused(offset, value):
    data = bytearray(encode_step(HEADER))
    data[offset] = value
    with pytest.raises(MessageError):
        decode_step(bytes(data))


@given(st.binary(max_size=256))
def test_any_bytes_are_a_step_header_or_a_message_error(data):
    try:
        header = decode_step(data)
    except MessageError:
        return
    assert encode_step(header) == data


def fields_changed(data, value):
    """Replace, drop or add a field of a message, keeping the rest as a peer would send it."""
    key = data.draw(st.sampled_from(sorted(value)))
    junk = data.draw(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
        | st.binary(max_size=64) | st.lists(st.integers(0, 9))
        | st.sampled_from(list(value.values()))
    )  # fmt: skip
    match data.draw(st.sampled_from(["replace", "drop", "add", "rename"])):
        case "replace":
            return {**value, key: junk}
        case "add":
            return {**value, data.draw(st.text(max_size=8) | st.integers(0, 9)): junk}
        case "drop":
            return {name: each for name, each in value.items() if name != key}
        case _:
            return {(junk if name == key and isinstance(junk, str) else name): each
                    for name, each in value.items()}  # fmt: skip


def bytes_changed(data, value):
    start = data.draw(st.integers(0, len(value)))
    end = data.draw(st.integers(start, min(len(value), start + 4)))
    return value[:start] + data.draw(st.binary(max_size=4)) + value[end:]


def is_a_message_or_refused(encoded):
    try:
        message = decode_message(encoded)
    except MessageError:
        return
    assert decode_message(encode_message(message)) == message


@given(st.data(), st.sampled_from(MESSAGES))
def test_a_message_with_any_field_changed_is_one_or_is_refused(data, message):
    is_a_message_or_refused(msgpack.packb(fields_changed(data, message.model_dump())))


@given(st.data(), st.sampled_from(MESSAGES))
def test_a_message_with_any_bytes_changed_is_one_or_is_refused(data, message):
    is_a_message_or_refused(bytes_changed(data, encode_message(message)))


@given(st.data())
def test_a_step_header_with_any_bytes_changed_is_one_or_is_refused(data):
    changed = bytes_changed(data, encode_step(HEADER))
    try:
        header = decode_step(changed)
    except MessageError:
        return
    assert encode_step(header) == changed
