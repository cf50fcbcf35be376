import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from pipeline.engine.tokenizer import TextStream, Tokenizer
from pipeline.errors import PromptError, TokenizerError


@pytest.fixture
def path(tmp_path):
    """A byte-level tokenizer without merges: every byte of UTF-8 is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HfTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def tokenizer(path):
    return Tokenizer(path)


TEXT = "Straße, naïve café — 東京 🦊🦊! " * 3


def test_text_survives_encoding_and_decoding(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == 256


@pytest.mark.parametrize("split", [0, 1, 5, 40])
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(tokenizer, split):
    ids = tokenizer.encode(TEXT)
    prompt, generated = ids[:split], ids[split:]
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token_id) for token_id in generated]
    if split != 40:  # there the prompt itself ends inside a character
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.finish() == TEXT[len(tokenizer.decode(prompt)) :]


def test_bytes_that_never_become_a_character_are_not_held_forever(tokenizer):
    (first, *_) = tokenizer.encode("東")
    stream = TextStream(tokenizer)
    text = "".join(stream.push(first) for _ in range(100))
    assert len(text) >= 90


def test_an_unfinished_character_is_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("🦊")
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in ids[:3]] == ["", "", ""]
    assert "\ufffd" in stream.finish()


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(PromptError, match="empty"):
        tokenizer.encode("")


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(PromptError, match="Unicode"):
        tokenizer.encode("\udcff")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"no\.json"):
        Tokenizer(tmp_path / "no.json")


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 3}'])
def test_a_file_that_is_not_a_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json") as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)
