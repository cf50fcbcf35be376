import json

import pytest

from pipeline.stego.adapters.sealed_request import SEALED_ARG, SealedRequests, sealed_arguments
from pipeline.stego.errors import StegoError
from pipeline.stego.message import seal
from tests.pipeline.stego.adapters.toys import (
    CONTEXT,
    END,
    HOW,
    PROMPT,
    SECRET,
    ToyEngine,
    read,
)  # fmt: skip


@pytest.fixture
def arguments():
    return sealed_arguments(seal(b"over there", SECRET, CONTEXT), "range", HOW, END)


def test_a_message_that_came_as_arguments_is_written(arguments):
    request = SealedRequests().open(arguments)
    ToyEngine().generate(PROMPT, request, 500)
    assert read(request.result()) == b"over there"


def test_neither_the_secret_nor_what_opens_the_message_is_in_the_arguments():
    sealed = seal(b"over there", SECRET, CONTEXT)
    (text,) = sealed_arguments(sealed, "range", HOW, END).values()
    for hidden in (SECRET.key, sealed.keys.seal, sealed.keys.mask, b"over there"):
        assert hidden.hex() not in text


def test_arguments_of_others_are_not_ours():
    assert SealedRequests().open({}) is None
    assert SealedRequests().open({"other": 1}) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("header", "00"),
        ("header", None),
        ("body", ""),
        ("body", "0"),
        ("codec_key", "00"),
        ("codec", "none"),
        ("codec", "fimec:block_bits=" + "9" * 5000),
        ("temperature", 0),
        ("temperature", 3),
        ("top_k", 1),
        ("top_k", -7),
        ("top_p", "x"),
        ("min_p", 2),
        ("excluded", ["x"]),
        ("excluded", [-1]),
        ("end_token_id", -1),
        ("new", 1),
    ],
)
def test_a_field_that_makes_no_sense_is_refused_in_one_line(arguments, field, value):
    fields = json.loads(arguments[SEALED_ARG]) | {field: value}
    with pytest.raises(StegoError) as refused:
        SealedRequests().check({SEALED_ARG: json.dumps(fields)})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [b"bytes", {1}, 5, []])
def test_what_is_no_object_is_refused_in_one_line(value):
    with pytest.raises(StegoError, match=SEALED_ARG):
        SealedRequests().open({SEALED_ARG: value})
