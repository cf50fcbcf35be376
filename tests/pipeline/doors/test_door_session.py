"""A client's session without any door: what it seals, names and refuses by itself."""

import pytest

from pipeline.doors.bodies import Place, parse_place
from pipeline.doors.door_evidence import TrustedKey
from pipeline.doors.door_session import DoorSession, SessionName
from pipeline.errors import MessageError, SessionError
from tests.pipeline.doors.rig import SECRET, model

__all__ = ["model"]


def session(model, key=bytes([9]) * 32):
    return DoorSession(SessionName.of("chat", SECRET), model.policy, model.codec, TrustedKey(key))


def test_names_tell_neither_the_name_nor_the_secret_and_are_always_the_same():
    names = [SessionName.of(*each) for each in (("a", SECRET), ("b", SECRET), ("a", b"x" * 32))]
    assert len({each.session_id for each in names}) == len({each.owner for each in names}) == 3
    assert names[0] == SessionName.of("a", SECRET)
    for name in ("../ö\0" * 99, "\udcff", ""):
        assert SessionName.of(name, SECRET).session_id.isalnum()
    assert SessionName.of_nobody() != SessionName.of_nobody()
    assert names[0].owner.hex() not in repr(names[0])


def test_no_step_is_sealed_under_a_nonce_of_before(model):
    own, seen = session(model), set()
    for position in (0, 5, 5, 0, 3):
        request = own.seal(position, model.rows(5), 1)
        seen.add(request.nonce[:12])
        again = own.reseal(TrustedKey(bytes([7]) * 32))
        assert again.cloaked_embedding == request.cloaked_embedding
        assert again.encrypted_session_key != request.encrypted_session_key
    assert len(seen) == 5
    own.restart()
    first = own.seal(0, model.rows(5), 1)
    assert first.nonce == Place(0, 0, 1).pack()
    # The same rows at the same place under another key.
    assert first.cloaked_embedding != session(model).seal(0, model.rows(5), 1).cloaked_embedding


def test_a_key_that_is_none_is_one_clear_error(model):
    for key in (bytes(32), bytes([1]) + bytes(31)):
        with pytest.raises(SessionError, match="none that can be sealed to"):
            session(model, key)


@pytest.mark.parametrize("nonce", [b"", bytes(15), bytes(17)], ids=len)
def test_a_place_has_16_bytes(nonce):
    with pytest.raises(MessageError, match="expected 16"):
        parse_place(nonce)
