"""Every byte of a channel is as it was recorded: a change of one is another version."""

import json
from pathlib import Path

import pytest

import transport
from tests.transport.wire_vectors import complete, told_frames
from transport.handshake import VERSION, LinkKind, RoleKind

ROOM = Path(transport.__file__).parent
RECORDED = json.loads((ROOM / "vectors.json").read_text())
# What nothing else follows from.
GIVEN = {
    "evidence", "link", "initiator_role", "responder_role", "core_hash", "epoch", "private_keys",
    "rekey_after_records", "authority_pem", "clock", "documents",
}  # fmt: skip


@pytest.mark.parametrize("vector", RECORDED["channels"], ids=lambda each: each["link"])
def test_keys_and_link_give_the_recorded_bytes(vector):
    given = {name: value for name, value in vector.items() if name in GIVEN}
    assert complete(given) == vector


@pytest.mark.parametrize("vector", RECORDED["channels"], ids=lambda each: each["link"])
@pytest.mark.parametrize("direction", ["initiator_to_responder", "responder_to_initiator"])
def test_a_recording_has_a_record_of_every_kind(vector, direction):
    kinds = [record["kind"] for record in vector[direction]]
    assert set(kinds) == {"FRAME", "BODY", "REKEY", "CLOSE"}
    assert kinds[-1] == "CLOSE"


@pytest.mark.parametrize("vector", RECORDED["channels"], ids=lambda each: each["link"])
def test_an_empty_tensor_at_the_end_leaves_its_padding_in_the_record(vector):
    *_, frame = RECORDED["frames"]
    assert [tensor["shape"] for tensor in frame["tensors"]] == [[0]]
    head_bytes = 6 + 2 + 4 + len(bytes.fromhex(frame["header"]))
    record = bytes.fromhex(vector["initiator_to_responder"][-2]["bytes"])
    assert head_bytes % 16
    assert len(record) == 8 + -(-head_bytes // 16) * 16 + 16


def test_the_recording_is_of_this_version():
    assert RECORDED["version"] == VERSION.decode()
    assert RECORDED["frames"] == json.loads(json.dumps(told_frames()))


def told_names(kinds):
    """As the document says them: a part is a worker that a stage asks."""
    names = {"PART": "a worker that a stage asks"}
    return [f"{int(each)} {names.get(each.name, each.name.lower())}" for each in kinds]


@pytest.mark.parametrize("kinds", [LinkKind, RoleKind], ids=lambda each: each.__name__)
def test_the_document_names_every_kind_of_link_and_role(kinds):
    assert ", ".join(told_names(kinds)) in (ROOM / "WIRE.md").read_text()
