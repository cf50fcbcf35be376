"""The line a person carries: whole and right, or refused with a reason."""

import base64

import pytest

from pipeline.errors import InputError
from pipeline.machines.offer_line import OfferLine, parse_offer_line
from transport.dial_and_listen import TcpEndpoint

LINE = OfferLine(TcpEndpoint("192.168.1.20", 9000), bytes(range(32)), bytes(range(16)))


@pytest.mark.parametrize("host", ["192.168.1.20", "fe80::1", "machine.example"])
def test_a_line_gives_back_what_went_in(host):
    line = OfferLine.new(TcpEndpoint(host, 9000), LINE.key)
    assert parse_offer_line(str(line)) == line
    assert set(str(line)) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")  # a QR code's alphabet


def test_secrets_are_fresh_and_the_handshake_gets_32_bytes():
    lines = [OfferLine.new(LINE.endpoint, LINE.key) for _ in range(2)]
    assert lines[0].secret != lines[1].secret
    assert len(lines[0].psk) == 32
    assert lines[0].psk != lines[1].psk


@pytest.mark.parametrize(
    "change", [str.lower, lambda t: f"  '{t}'\n", lambda t: t[:40] + "\n" + t[40:]]
)
def test_what_copying_does_to_a_line_is_undone(change):
    assert parse_offer_line(change(str(LINE))) == LINE


def altered_lines():
    text = str(LINE)
    for position in range(4, len(text) - 1):  # the last one has bits that mean nothing
        other = "A" if text[position] != "A" else "B"
        yield text[:position] + other + text[position + 1 :]
        yield text[:position] + text[position + 1 :]
        yield text[:position]


def test_every_mistyped_or_missing_character_is_noticed():
    for text in altered_lines():
        with pytest.raises(InputError, match="mistyped or not whole") as caught:
            parse_offer_line(text)
        assert text[20:] not in str(caught.value) or len(text) <= 20  # it holds the secret


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no such line"),
        ("--push", "no such line"),
        ("VP2-ABCD", "another version"),
        ("VP1-", "mistyped"),
        ("VP1-" + "A" * 5000, "mistyped"),
        ("VP1-é", "mistyped"),
        ("VP1-" + base64.b32encode(bytes(60)).decode(), "mistyped"),
    ],
)
def test_what_is_no_line_is_refused_in_one(text, words):
    with pytest.raises(InputError, match=words) as caught:
        parse_offer_line(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
