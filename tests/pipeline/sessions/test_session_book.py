"""What home keeps of sessions, and forgets."""

import pytest

from pipeline.errors import InputError
from pipeline.sessions.session_book import SessionBook
from pipeline.sessions.session_keys import SessionKeys

OWN, CLIENT = "", "ab" * 32


@pytest.fixture
def book(tmp_path):
    keys = SessionKeys(SessionKeys.new_secret())
    return SessionBook(tmp_path / "sessions", keys, "model", bytes(32), 1)


def write(book, owner, name):
    session = book.open(owner, name)
    book.write(session.session_id, session.record)
    return session.session_id


def test_a_name_is_forgotten_of_all_its_owners_and_no_other(book):
    for owner in (OWN, CLIENT):
        write(book, owner, "mine")
        write(book, owner, "other")
    assert book.forget("mine")
    assert [(each.owner, each.name) for each in book.records() if each.name == "mine"] == []
    assert {each.owner for each in book.records()} == {OWN, CLIENT}
    assert not book.forget("mine")


def test_what_only_a_client_of_a_server_calls_so_is_forgotten(book):
    write(book, CLIENT, "theirs")
    assert book.forget("theirs")
    assert list(book.records()) == []


def test_a_damaged_record_is_forgotten_and_keeps_no_other(book, tmp_path):
    damaged, _ = write(book, OWN, "damaged"), write(book, CLIENT, "whole")
    (tmp_path / "sessions" / f"{damaged.hex()}.session").write_text("AAAA")
    told = [each for each in book.records() if isinstance(each, InputError)]
    assert len(told) == 1
    assert "damaged" in str(told[0])
    assert book.forget("whole")
    assert book.forget("damaged")
    assert list(book.records()) == []
