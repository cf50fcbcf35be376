"""PROTOCOL.md says what the code does: its examples, its fields, its numbers."""

import re
from pathlib import Path
from typing import get_args

import pytest

import pipeline.protocol
from pipeline.agreement.manifest import MAX_MANIFEST_BYTES
from pipeline.orchestrator import stage_watch
from pipeline.protocol import (
    last_stage_inputs,
    links,
    messages,
    peer_connections,
    result_kinds,
    step_header,
    step_limits,
)
from pipeline.protocol.batch import Segment
from pipeline.protocol.last_stage_inputs import Asked, asked_to_wire
from pipeline.protocol.messages import Message, encode_message
from pipeline.protocol.result_kinds import NO_TOKEN, Result, Want
from pipeline.protocol.step_header import StepHeader, StepKind, encode_step
from pipeline.protocol.time_limits import DEFAULT_TIMES
from pipeline.sampling.draw import Draw
from pipeline.sampling.params import SamplingParams
from pipeline.scx.attention_wire import Op
from pipeline.stage import data_channels, session, slot_storage, worker
from pipeline.stage.session_admission import MAX_STEP_TOKENS
from transport.handshake import MAX_EVIDENCE_BYTES
from transport.records import MAX_PLAINTEXT_BYTES
from transport.tensor_frames import MAX_HEADER_BYTES

TEXT = (Path(pipeline.protocol.__file__).parents[1] / "PROTOCOL.md").read_text()
EXAMPLES = re.findall(r"```example\n(.+?)\n(.+?)```", TEXT, re.DOTALL)
MESSAGES = {each.model_fields["type"].default: each for each in get_args(Message)}
NAMES = (
    vars(messages)
    | vars(step_header)
    | {each.__name__: each for each in (Segment, Want, Draw, SamplingParams)}
)


def encode(value):
    if isinstance(value, StepHeader):
        return encode_step(value)
    if isinstance(value, Draw):
        return bytes(asked_to_wire(Asked(draws=(value,)))[0].data)
    return encode_message(value)


@pytest.mark.parametrize(("source", "dump"), EXAMPLES, ids=[each[0][:40] for each in EXAMPLES])
def test_an_example_is_what_the_code_sends(source, dump):
    value = eval(source, {"__builtins__": {"bytes": bytes}}, NAMES)
    assert encode(value).hex(" ") == " ".join(dump.split())


def test_there_are_examples_of_each_kind():
    assert {type(eval(source, {}, NAMES)).__name__ for source, _ in EXAMPLES} >= {
        "StepHeader",
        "Draw",
        "Health",
        "Rewind",
    }


def rows_of(name):
    """Names in the first column of a message's table."""
    table = re.search(rf"\n`{name}`\n\n((?:\|.*\n)+)", TEXT)
    return re.findall(r"^\| `(\w+)` \|", table.group(1), re.MULTILINE)


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_of_every_message_is_told_and_no_other(name):
    expected = list(MESSAGES[name].model_fields)
    if name == "healthy":
        expected += list(messages.StageFigures.model_fields)
    assert rows_of(name) == expected


def test_every_type_of_message_is_told_and_no_other():
    table = re.search(r"\| `type` \| who \| when \|\n\|.*\n((?:\|.*\n)+)", TEXT).group(1)
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(MESSAGES)


@pytest.mark.parametrize("members", [StepKind, Result], ids=lambda each: each.__name__)
def test_every_number_has_its_name(members):
    for member in members:
        assert re.search(rf"^\| {int(member)} \| {member.name} \|", TEXT, re.MULTILINE)


@pytest.mark.parametrize(
    ("before", "number", "after"),
    [
        ("Protocol version ", step_header.PROTOCOL_VERSION, "."),
        ("map of at most ", messages.MAX_CONTROL_BYTES, " bytes"),
        ("segments, s: at most ", step_header.MAX_SEGMENTS, " |"),
        ("timings, t: at most ", step_header.MAX_STAGES, " |"),
        ("a stage takes at most ", MAX_STEP_TOKENS, " |"),
        ("Header: ", links.MAX_STEP_HEADER_BYTES, " bytes"),
        ("or are DRAWN: ", step_limits.WHOLE_ROWS, " for each slot"),
        ("Log-probabilities: ", step_limits.MAX_LOGPROBS, " a step"),
        ("biased tokens u32, b: at most ", last_stage_inputs.MAX_BIASES, " |"),
        ("a vocabulary of ", last_stage_inputs.MAX_VOCAB, "."),
        ("**No token.** ", NO_TOKEN, " stands"),
    ],
)
def test_every_limit_is_the_codes(before, number, after):
    assert f"{before}{number:,}{after}" in TEXT


@pytest.mark.parametrize(
    ("seconds", "what"),
    [
        (DEFAULT_TIMES.handshake_seconds, "a peer whose turn it is"),
        (peer_connections.NO_ANSWER_SECONDS, "between tries"),
        (DEFAULT_TIMES.connect_seconds, "nobody comes nearer"),
        (stage_watch.HEALTH_SECONDS, "between two `health`"),
        (DEFAULT_TIMES.idle_seconds, "a stage answers none"),
        (DEFAULT_TIMES.idle_seconds, "an orchestrator says nothing"),
        (DEFAULT_TIMES.init_seconds, "one that has not sent `init`"),
        (worker.STALE_SECONDS, "one that says nothing makes way"),
        (worker.BUSY_SECONDS, "another orchestrator waits"),
        (data_channels.WAITING_SECONDS, "between two `waiting`"),
        (slot_storage.STORE_SECONDS, "a store that does not answer"),
        (session.LEAVE_SECONDS, "told to stop"),
        (peer_connections.GOODBYE_SECONDS, "for a last message"),
    ],
)
def test_every_time_limit_is_the_codes(seconds, what):
    assert re.search(rf"^\| {seconds:g} \| [a-z ]+ \| {re.escape(what)}", TEXT, re.MULTILINE)


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (MAX_MANIFEST_BYTES, "bytes of a manifest"),
        (step_header.MAX_STAGES, "stages of one"),
        (MAX_EVIDENCE_BYTES, "bytes of an evidence document"),
        (peer_connections.MAX_PENDING_HANDSHAKES, "handshakes under way"),
        (MAX_PLAINTEXT_BYTES, "bytes of a record's plaintext"),
        (MAX_HEADER_BYTES, "bytes of a frame's header"),
        (messages.MAX_CONTROL_BYTES, "bytes of a control message"),
        (links.MAX_STEP_HEADER_BYTES, "bytes of a step's header"),
        (step_header.MAX_SEGMENTS, "slots of a session"),
        (MAX_STEP_TOKENS, "rows of a step"),
        (last_stage_inputs.MAX_VOCAB, "tokens of a vocabulary"),
    ],
)
def test_every_cap_is_the_codes(number, what):
    assert re.search(rf"^\| {number:,} \| {re.escape(what)}", TEXT, re.MULTILINE)


def test_every_question_to_an_attention_worker_is_told():
    table = TEXT[TEXT.index("`attention`: ") : TEXT.index("`linear` and")]
    assert list(map(int, re.findall(r"^\| (\d+), ", table, re.MULTILINE))) == list(Op)


def test_the_layouts_have_the_bytes_that_are_told():
    for title, size in (
        ("the segments", step_header._SEGMENT_BYTES),
        ("a timing", step_header.TIMING_BYTES),
    ):
        assert re.search(rf"^\| {size}·[st] \| {title}", TEXT, re.MULTILINE)
    draw = TEXT[TEXT.index("**Draws.**") :]
    fixed = re.findall(r"^\| (\d+) \|", draw[: draw.index("8·rows")], re.MULTILINE)
    assert sum(map(int, fixed)) == last_stage_inputs._DRAW.size
    assert result_kinds.MAX_TOP == 255
