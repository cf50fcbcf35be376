"""Names and keys of sessions: all different, and none without the secret."""

import itertools

import pytest

from pipeline.sessions.session_keys import SessionKeys

SECRET = bytes(range(32))


def test_a_secret_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="31 bytes"):
        SessionKeys(bytes(31))


def test_no_two_sessions_have_one_name():
    pairs = [
        *itertools.product(("", "a", "ab", "key"), ("", "b", "a", "../../etc/passwd", "é" * 900))
    ]
    keys = [SessionKeys(SECRET), SessionKeys(SECRET[::-1])]
    names = {each.session_id(*pair) for each in keys for pair in pairs}
    assert len(names) == 2 * len(pairs)
    assert {len(name) for name in names} == {32}


def test_every_use_has_a_key_of_its_own():
    keys = SessionKeys(SECRET)
    ids = [keys.session_id("", name) for name in "ab"]
    salts, cores = [bytes(32), b"s" * 32], [b"c" * 32, b"d" * 32]
    found = [keys.stage_key(*each) for each in itertools.product(ids, salts, cores, range(3))]
    found += [keys.record_key(each) for each in ids] + ids
    assert len(set(found)) == len(found)
