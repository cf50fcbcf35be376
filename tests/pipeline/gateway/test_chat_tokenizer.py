import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from pipeline.engine.generation import TokenOutput
from pipeline.engine.request import FinishReason
from pipeline.errors import PromptError
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.continuations import ChoiceText


def outputs(token_ids, finish=FinishReason.LENGTH):
    last = len(token_ids) - 1
    return [
        TokenOutput(t, None, (), finish if i == last else None) for i, t in enumerate(token_ids)
    ]


def test_tokens_bytes_are_the_texts_bytes(tokenizer):
    text = "naïve 日本 \x00\n~ÿ"
    ids = tokenizer.encode_rendered(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_special_and_unknown_tokens_have_bytes_too(tokenizer):
    assert tokenizer.token_bytes(256) == b"<|end|>"
    assert tokenizer.token_bytes(100_000) == b""


def test_sentencepiece_vocabularies_are_read_as_well(tmp_path):
    vocab = {"\u2581the": 0, "<0xC3>": 1, "x": 2, "<unk>": 3}
    raw = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = GatewayTokenizer(tmp_path / "tokenizer.json")
    assert [tokenizer.token_bytes(i) for i in (0, 1, 2, 4)] == [b" the", b"\xc3", b"x", b"<s>"]


def test_a_rendered_chat_keeps_its_special_tokens_and_gets_no_others(tokenizer):
    assert tokenizer.encode_rendered("a<|end|>").count(256) == 1
    with pytest.raises(PromptError):
        tokenizer.encode_rendered("")


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_join_to_the_text_up_to_its_stop(tokenizer, text, stops):
    if not text:
        return
    choice = ChoiceText(0, tokenizer, (), stops)
    joined, placed, finish = "", [], None
    for output in outputs(tokenizer.encode_rendered(text)):
        piece = choice.push(output)
        joined += piece.text
        placed += piece.tokens
        finish = piece.finish
        if finish:
            break
    if "<|end|>" in text:
        return
    if finish == "length":
        assert joined == text
        assert not any(stop in text for stop in stops)
        assert b"".join(tokenizer.token_bytes(p.output.token_id) for p in placed) == text.encode()
    else:
        assert finish == "stop"
        assert any(text.startswith(joined + stop) for stop in stops)
    # A token belongs to an answer exactly if its text begins in it.
    assert [p.offset for p in placed] == sorted(p.offset for p in placed)
    assert all(p.offset < len(joined) for p in placed) or finish == "length"


def test_the_token_that_ends_a_text_is_no_part_of_it(tokenizer):
    choice = ChoiceText(0, tokenizer, (), ())
    ids = [*tokenizer.encode_rendered("hi"), tokenizer.encode_rendered("!")[0]]
    pieces = [choice.push(output) for output in outputs(ids, FinishReason.EOS)]
    assert "".join(piece.text for piece in pieces) == "hi"
    assert sum(len(piece.tokens) for piece in pieces) == 2
    assert pieces[-1].finish == "stop"


def test_an_incomplete_character_at_the_end_is_shown_as_such(tokenizer):
    choice = ChoiceText(0, tokenizer, (), ())
    ids = tokenizer.encode_rendered("a日")[:-1]
    assert "".join(choice.push(output).text for output in outputs(ids)) == "a\ufffd"


@pytest.mark.parametrize("stop", ["<|end|>", "i<|end|>", "<|end|>!", "hi<|end|>!"])
def test_a_stop_string_may_name_a_special_token(tokenizer, stop):
    choice = ChoiceText(0, tokenizer, (), [stop])
    ids = tokenizer.encode_rendered("hi<|end|>! you")
    pieces = []
    for output in outputs(ids):
        pieces.append(choice.push(output))
        if pieces[-1].finish:
            break
    assert "".join(piece.text for piece in pieces) == "hi<|end|>".partition(stop.strip("!"))[0]
    assert pieces[-1].finish == "stop"


def test_special_tokens_are_not_shown_and_end_nothing_unasked(tokenizer):
    choice = ChoiceText(0, tokenizer, (), ["end"])
    ids = tokenizer.encode_rendered("hi<|end|>! you")
    pieces = [choice.push(output) for output in outputs(ids)]
    assert "".join(piece.text for piece in pieces) == "hi! you"
    assert pieces[-1].finish == "length"
