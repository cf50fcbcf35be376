"""What is sealed opens with the same secret and context, and looks random without."""

import zlib

import numpy as np
import pytest

from pipeline.stego import message as message_module
from pipeline.stego.errors import StegoError
from pipeline.stego.keys import Secret
from pipeline.stego.message import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    TAG_BYTES,
    read_header,
    seal,
)

SECRET = Secret(bytes(range(32)))
CONTEXT = b"model and settings"


def opened(sealed, secret=SECRET, context=CONTEXT):
    return read_header(sealed.header, secret).open(sealed.body, context)


@pytest.mark.parametrize("message", [b"a", b"\0" * 3, "grüße".encode(), bytes(range(256)) * 4])
def test_what_is_sealed_opens_again(message):
    assert opened(seal(message, SECRET, CONTEXT)) == message


@pytest.mark.parametrize("key", [b"", bytes(32)])
def test_what_is_sealed_by_a_passphrase_opens_again(key):
    secret = Secret(key, b"correct horse")
    assert opened(seal(b"hello", secret, CONTEXT), secret) == b"hello"


def test_the_overhead_is_36_bytes():
    sealed = seal(b"1234567", SECRET, CONTEXT)
    assert len(sealed.header) + len(sealed.body) == 7 + 36 == 7 + HEADER_BYTES + TAG_BYTES


def test_a_message_is_compressed_where_that_is_shorter_and_only_there():
    text = b"the same words again and again, " * 30
    short, plain = seal(text, SECRET, CONTEXT), seal(text, SECRET, CONTEXT, compresses=False)
    assert len(short.body) < 100 < len(plain.body) == len(text) + TAG_BYTES
    assert opened(short) == opened(plain) == text
    assert len(seal(b"xyz", SECRET, CONTEXT).body) == 3 + TAG_BYTES


@pytest.mark.parametrize("other", [
    Secret(bytes(32)), Secret(bytes(range(32)), b"pass"), Secret(passphrase=bytes(range(32))),
])  # fmt: skip
def test_another_secret_opens_nothing(other):
    for _ in range(20 if not other.passphrase else 1):
        with pytest.raises(StegoError, match="wrong secret"):
            opened(seal(b"hello", SECRET, CONTEXT), other)


def test_another_context_opens_nothing():
    with pytest.raises(StegoError, match="wrong secret, model or settings"):
        opened(seal(b"hello", SECRET, CONTEXT), context=b"other settings")


def test_any_altered_byte_is_refused():
    sealed = seal(b"hello", SECRET, CONTEXT)
    whole = sealed.header + sealed.body
    for i in range(len(whole)):
        bad = bytearray(whole)
        bad[i] ^= 1
        with pytest.raises(StegoError):
            read_header(bytes(bad[:HEADER_BYTES]), SECRET).open(bytes(bad[HEADER_BYTES:]), CONTEXT)


def test_two_messages_under_one_secret_share_no_keystream():
    first, second = (seal(bytes(64), SECRET, CONTEXT, compresses=False) for _ in range(2))
    same = sum(a == b for a, b in zip(first.body, second.body, strict=True))
    assert same < 8
    assert len({first.keys.seal, second.keys.seal, first.keys.codec, first.keys.tail}) == 4


def test_all_that_is_carried_is_uniform():
    bits = np.concatenate([
        np.unpackbits(np.frombuffer(sealed.header + sealed.body, np.uint8))
        for sealed in (seal(bytes(10), SECRET, CONTEXT, compresses=False) for _ in range(2000))
    ]).reshape(2000, -1)  # fmt: skip
    deviations = (bits.mean(axis=0) - 0.5) * 2 * np.sqrt(2000)
    assert np.abs(deviations).max() < 5


@pytest.mark.parametrize(("message", "what"), [
    (b"", "empty"), (bytes(MAX_MESSAGE_BYTES + 1), str(MAX_MESSAGE_BYTES)),
])  # fmt: skip
def test_no_message_and_too_much_are_refused_in_a_line(message, what):
    with pytest.raises(StegoError, match=what):
        seal(message, SECRET, CONTEXT)


def test_the_longest_message_is_carried():
    message = bytes(MAX_MESSAGE_BYTES)
    assert opened(seal(message, SECRET, CONTEXT)) == message


def sealed_as_compressed(monkeypatch, content):
    monkeypatch.setattr(message_module.zlib, "compress", lambda *_: content)
    return seal(bytes(len(content) + 1), SECRET, CONTEXT)


@pytest.mark.parametrize("content", [
    zlib.compress(bytes(1 << 24), 9, -15), b"\xff\xff\xff", zlib.compress(b"ab", 9, -15) + b"more",
    zlib.compress(b"", 9, -15),
])  # fmt: skip
def test_what_does_not_unpack_to_a_message_is_refused(monkeypatch, content):
    with pytest.raises(StegoError, match="authentic, but"):
        opened(sealed_as_compressed(monkeypatch, content))


def test_there_is_no_secret_without_content():
    with pytest.raises(StegoError, match="no secret"):
        Secret()
    with pytest.raises(StegoError, match="32 bytes"):
        Secret(b"short")


def test_secrets_and_keys_are_not_shown():
    assert "correct" not in repr(Secret(b"k" * 32, b"correct horse"))
    assert repr(seal(b"a", SECRET, CONTEXT).keys) == "MessageKeys()"
