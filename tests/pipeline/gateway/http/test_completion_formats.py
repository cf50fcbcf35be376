"""What is said of tokens: no entry is lost, whatever their texts are."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from pipeline.engine.generation import TokenOutput
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.continuations import PlacedToken, TextPiece
from pipeline.gateway.http.completion_formats import ChatFormat, CompletionFormat
from pipeline.gateway.http.prompt_formats import Echo

A, A_BYTE, B, B_BYTE, C3_BYTE, C3_BYTE_TOO = range(6)


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Two tokens for `a`, two for `b`; and one that is half a character."""
    vocab = {"a": A, "<0x61>": A_BYTE, "b": B, "<0x62>": B_BYTE, "<0xC3>": C3_BYTE, "<unk>": 5}
    raw = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    path = tmp_path_factory.mktemp("alike") / "tokenizer.json"
    raw.save(str(path))
    return GatewayTokenizer(path)


def piece(*outputs, finish=None):
    return TextPiece(0, "", tuple(PlacedToken(i, each) for i, each in enumerate(outputs)), finish)


def whole(format_, *pieces):
    choice = format_.whole(0)
    for each in pieces:
        choice.add(each)
    return json.loads(b"".join(choice.to_json()))


def sampled(token_id, *top):
    return TokenOutput(token_id, dict(top).get(token_id, -9.0), top, None)


@pytest.mark.parametrize(
    ("token_id", "expected"),
    [
        (A, {"a": -0.1, "token_id:1": -2.0, "b": -3.0, "token_id:3": -4.0}),
        # The chosen token's text names the chosen token's logprob.
        (A_BYTE, {"token_id:0": -0.1, "a": -2.0, "b": -3.0, "token_id:3": -4.0}),
        (B_BYTE, {"a": -0.1, "token_id:1": -2.0, "token_id:2": -3.0, "b": -4.0}),
        (C3_BYTE, {"a": -0.1, "token_id:1": -2.0, "b": -3.0, "token_id:3": -4.0}),
    ],
)
def test_tokens_with_one_text_each_keep_their_logprob(alike, token_id, expected):
    output = sampled(token_id, (A, -0.1), (A_BYTE, -2.0), (B, -3.0), (B_BYTE, -4.0))
    format_ = CompletionFormat(alike, 4, [Echo()])
    for logprobs in (
        format_.delta(piece(output))["logprobs"],
        whole(format_, piece(output))["logprobs"],
    ):
        (top,) = logprobs["top_logprobs"]
        assert top == expected
        name = logprobs["tokens"][0]
        assert top.get(name, -9.0) == logprobs["token_logprobs"][0]


def test_a_chat_lists_tokens_with_one_text_apart_and_with_their_bytes(alike):
    output = sampled(A_BYTE, (A, -0.1), (A_BYTE, -2.0), (C3_BYTE, -3.0))
    format_ = ChatFormat(alike, True)
    for logprobs in (
        format_.delta(piece(output))["logprobs"],
        whole(format_, piece(output))["logprobs"],
    ):
        (token,) = logprobs["content"]
        assert (token["token"], token["bytes"], token["logprob"]) == ("a", [0x61], -2.0)
        assert [(each["bytes"], each["logprob"]) for each in token["top_logprobs"]] == [
            ([0x61], -0.1), ([0x61], -2.0), ([0xC3], -3.0),
        ]  # fmt: skip


@pytest.mark.parametrize("has_logprobs", [False, True])
def test_a_whole_answer_is_what_its_stream_adds_up_to(alike, has_logprobs):
    outputs = [sampled(i % 4, (A, -0.5), (B, float("-inf"))) for i in range(7)]
    pieces = [
        piece(*outputs[:3]), piece(), piece(*outputs[3:4]), piece(*outputs[4:], finish="length")
    ]  # fmt: skip
    text = CompletionFormat(alike, 2 if has_logprobs else None, [Echo("echo")])
    deltas = [text.delta(each) for each in pieces]
    said = whole(text, *pieces)
    assert (said["text"], said["finish_reason"], said["index"]) == ("echo", "length", 0)
    if has_logprobs:
        for name, column in said["logprobs"].items():
            assert column == [value for each in deltas for value in each["logprobs"][name]]
    else:
        assert said["logprobs"] is None
    chat = ChatFormat(alike, has_logprobs)
    said = whole(chat, *pieces)
    assert said["message"] == {"role": "assistant", "content": "", "refusal": None}
    if has_logprobs:
        parts = [chat.delta(each)["logprobs"] for each in pieces]
        assert said["logprobs"]["content"] == [
            token for part in parts if part for token in part["content"]
        ]
    else:
        assert said["logprobs"] is None
