"""A cipher's counter: only success moves it, and never to the reserved nonce."""

import pytest
from cryptography.exceptions import InvalidTag

from transport.cipher import AEADS, REKEY_NONCE, CipherState
from transport.errors import MisuseError


def test_counter_never_reaches_the_nonce_reserved_for_rekey():
    cipher = CipherState(AEADS["ChaChaPoly"], bytes(32))
    cipher.nonce = REKEY_NONCE
    with pytest.raises(MisuseError):
        cipher.encrypt(b"", b"")


def test_counter_does_not_move_on_a_forged_message():
    sender = CipherState(AEADS["ChaChaPoly"], bytes(32))
    receiver = CipherState(AEADS["ChaChaPoly"], bytes(32))
    sealed = sender.encrypt(b"ad", b"text")
    with pytest.raises(InvalidTag):
        receiver.decrypt(b"other", sealed)
    assert receiver.nonce == 0
    assert receiver.decrypt(b"ad", sealed) == b"text"
