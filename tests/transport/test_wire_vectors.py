"""Every byte of a channel is as it was recorded: a change of one is another version."""

import json
from pathlib import Path

import pytest

import transport
from tests.transport.wire_vectors import complete, told_frames
from transport.handshake import VERSION

RECORDED = json.loads((Path(transport.__file__).parent / "vectors.json").read_text())
# What nothing else follows from.
GIVEN = {
    "evidence", "link", "initiator_role", "responder_role", "core_hash", "epoch", "private_keys",
    "rekey_after_records", "authority_pem", "clock", "documents",
}  # fmt: skip


@pytest.mark.parametrize("vector", RECORDED["channels"], ids=lambda each: each["evidence"])
def test_keys_and_link_give_the_recorded_bytes(vector):
    given = {name: value for name, value in vector.items() if name in GIVEN}
    assert complete(given) == vector


@pytest.mark.parametrize("vector", RECORDED["channels"], ids=lambda each: each["evidence"])
@pytest.mark.parametrize("direction", ["initiator_to_responder", "responder_to_initiator"])
def test_a_recording_has_a_record_of_every_kind(vector, direction):
    kinds = [record["kind"] for record in vector[direction]]
    assert set(kinds) == {"FRAME", "BODY", "REKEY", "CLOSE"}
    assert kinds[-1] == "CLOSE"


def test_the_recording_is_of_this_version():
    assert RECORDED["version"] == VERSION.decode()
    assert RECORDED["frames"] == json.loads(json.dumps(told_frames()))
