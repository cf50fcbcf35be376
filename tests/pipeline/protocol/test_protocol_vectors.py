"""What is recorded of the protocol stays as it is: a change of a byte is another version."""

import json
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.codecs.registry import make_codec
from pipeline.protocol.messages import decode_message, encode_message
from pipeline.protocol.step_header import PROTOCOL_VERSION, decode_step, encode_step
from tests.pipeline.protocol.session_vector import (
    WIDTH,
    manifest_hashes,
    rows,
    sent_rows,
    session,
)
from transport.tensor_frames import DType, Tensor, TensorSpec

RECORDED = json.loads((Path(pipeline.__file__).parent / "vectors.json").read_text())


def test_the_recording_is_of_this_version():
    assert RECORDED["version"] == PROTOCOL_VERSION


def test_every_example_manifest_has_the_recorded_hash():
    assert manifest_hashes() == RECORDED["manifests"]


@pytest.mark.parametrize("recorded", RECORDED["rows"], ids=lambda each: each["codec"])
def test_rows_are_sent_as_recorded(recorded):
    # But for the last bit of a sum, which processors round in orders of their own.
    for found, expected in zip(sent_rows(recorded["codec"]), recorded["tensors"], strict=True):
        assert (found["dtype"], found["shape"]) == (expected["dtype"], expected["shape"])
        if found["dtype"] == "F32":
            np.testing.assert_allclose(values(found), values(expected), rtol=1e-6)
        else:
            assert np.count_nonzero(values(found) != values(expected)) <= 1


def spec(told):
    return TensorSpec(DType[told["dtype"]], tuple(told["shape"]))


def values(tensor):
    kind = {"F32": "<f4", "F16": "<u2", "BF16": "<u2", "I8": "i1", "U8": "u1"}[tensor["dtype"]]
    return np.frombuffer(bytes.fromhex(tensor["bytes"]), kind)


@pytest.mark.parametrize("recorded", RECORDED["rows"], ids=lambda each: each["codec"])
def test_recorded_rows_are_read_as_what_was_sent(recorded):
    tensors = [
        Tensor(spec(each), memoryview(bytes.fromhex(each["bytes"]))) for each in recorded["tensors"]
    ]
    found = make_codec(recorded["codec"], WIDTH).decode(tuple(tensors))
    coarse = {"F16": 1e-3, "BF16": 1e-2, "I8": 0.02, "I5": 0.15}[recorded["codec"]]
    sent = rows(3, WIDTH)
    assert np.linalg.norm(found - sent) <= coarse * np.linalg.norm(sent)


@pytest.mark.parametrize("index", range(len(RECORDED["session"])))
def test_a_recorded_frame_says_what_its_bytes_say(index):
    frame = RECORDED["session"][index]
    header = bytes.fromhex(frame["header"])
    if frame["link"] == "control":
        assert encode_message(decode_message(header)) == header
    else:
        assert encode_step(decode_step(header)) == header


async def test_a_stage_goes_through_the_recorded_session_frame_by_frame(tiny_model, tmp_path):
    found = await session(tiny_model, tmp_path)
    assert [shape(each) for each in found] == [shape(each) for each in RECORDED["session"]]


def shape(frame):
    """All but what is another in each run: addresses, epochs, timings, figures, tokens."""
    header = bytes.fromhex(frame["header"])
    if frame["link"] == "control":
        said = type(decode_message(header)).__name__
    else:
        said = str(decode_step(header)._replace(timings=()))
    specs = [(each["dtype"], each["shape"]) for each in frame.get("tensors", ())]
    return frame["link"], frame["to_stage"], said, specs
