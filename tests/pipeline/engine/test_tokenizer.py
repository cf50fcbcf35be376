import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer

from pipeline.engine.text_stream import TextStream
from pipeline.engine.tokenizer import Tokenizer
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


@pytest.mark.parametrize("split", [0, 1, 6, 41])
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(tokenizer, split):
    ids = tokenizer.encode(TEXT)
    prompt, generated = ids[:split], ids[split:]
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token_id) for token_id in generated]
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


def test_truncation_and_padding_that_training_left_behind_are_not_obeyed(path):
    whole = Tokenizer(path).encode(TEXT)
    library = HfTokenizer.from_file(str(path))
    library.enable_truncation(5)
    library.enable_padding(length=1000)
    library.save(str(path))
    tokenizer = Tokenizer(path)
    assert tokenizer.encode(TEXT) == whole
    assert tokenizer.encode(TEXT, add_special_tokens=False) == whole


def test_a_text_the_vocabulary_cannot_spell_is_refused(tmp_path):
    model = models.WordPiece({"a": 0}, unk_token="[UNK]")  # and there is no [UNK]
    HfTokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PromptError, match="cannot spell"):
        Tokenizer(tmp_path / "tokenizer.json").encode("b")


def with_added(path, *tokens, post_processor=None):
    library = HfTokenizer.from_file(str(path))
    library.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    if post_processor is not None:
        library.post_processor = post_processor
    library.save(str(path))
    return Tokenizer(path)


def test_an_added_token_beyond_the_model_harms_only_the_prompt_that_spells_it(path):
    tokenizer = with_added(path, "<pad>")
    assert tokenizer.encode("a<pad>")[1] == 256
    assert tokenizer.vocab_size == 257
    tokenizer.check_vocabulary(256)
    assert tokenizer.vocab_size == 256
    assert len(tokenizer.encode("a")) == 1
    with pytest.raises(PromptError, match="token 256, and the model has only 0 to 255"):
        tokenizer.encode("a<pad>")
    with pytest.raises(PromptError, match="256"):
        tokenizer.check_ids((1, 256, 2))
    tokenizer.check_vocabulary(300)  # rows without a token are only padding
    assert tokenizer.encode("a<pad>")[1] == 256


def test_a_tokenizer_whose_ordinary_text_is_beyond_the_model_is_refused(path):
    with pytest.raises(TokenizerError, match=r"256 tokens, the model 255;.*belongs to the model"):
        Tokenizer(path).check_vocabulary(255)


def test_a_token_that_no_text_is_given_harms_nobody(tmp_path):
    vocab = {"a": 0, "b": 1, "ab": 2}  # without a merge nothing makes the third of the others
    for merges, is_refused in (([], False), ([("a", "b")], True)):
        library = HfTokenizer(models.BPE(vocab, merges))
        library.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer(tmp_path / "tokenizer.json")
        if is_refused:
            with pytest.raises(TokenizerError, match="3 tokens, the model 2"):
                tokenizer.check_vocabulary(2)
        else:
            tokenizer.check_vocabulary(2)
            assert tokenizer.encode("ab") == (0, 1)


def test_a_tokenizer_that_puts_a_token_beyond_the_model_before_every_text_is_refused(path):
    begin = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 256)])
    tokenizer = with_added(path, "<s>", post_processor=begin)
    with pytest.raises(TokenizerError, match="257 tokens, the model 256"):
        tokenizer.check_vocabulary(256)


def test_ids_count_and_not_how_many_there_are(tmp_path):
    vocab = {"a": 0, "b": 9}  # with a hole, as vocabularies that were cut have
    library = HfTokenizer(models.WordLevel(vocab, unk_token="a"))
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="10 tokens, the model 9"):
        tokenizer.check_vocabulary(9)
    tokenizer.check_vocabulary(10)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, set()),
        ({"config.json": {"eos_token_id": 3}}, {3}),
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {}}, set()),
        ({"generation_config.json": {"eos_token_id": [3, 4, "5", -1, True]}}, {3, 4}),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, {256}),
        ({"tokenizer_config.json": {"eos_token": None}}, set()),
        (
            {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "</s>"}}},
            {257},
        ),
        ({"special_tokens_map.json": {"eos_token": {"content": "</s>"}}}, {257}),
        (
            {"special_tokens_map.json": {"eos_token": ["</s>", {"content": "<|im_end|>"}]}},
            {256, 257},
        ),
        ({"special_tokens_map.json": {"eos_token": "<never heard of>"}}, set()),
        (
            {
                "tokenizer_config.json": {
                    "eos_token": "<late>",
                    "added_tokens_decoder": {
                        "300": {"content": "<late>"},
                        "301": {"content": "<pad>"},
                        "x": 3,
                        "²": "<late>",
                    },
                }
            },
            {300},
        ),
        ({"tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": [3]}}, {257}),
        (
            {
                "config.json": {"eos_token_id": 2},
                "generation_config.json": {"eos_token_id": 3},
                "tokenizer_config.json": {"eos_token": "<|im_end|>"},
            },
            {2, 3, 256},
        ),
    ],
)
def test_every_file_of_a_model_may_name_a_token_that_ends_a_text(path, files, ends):
    for name, fields in files.items():
        (path.parent / name).write_text(json.dumps(fields))
    assert with_added(path, "<|im_end|>", "</s>").end_token_ids == ends


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_beside_the_tokenizer_that_cannot_be_read_is_named(path, content):
    (path.parent / "special_tokens_map.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"special_tokens_map\.json is not"):
        _ = Tokenizer(path).end_token_ids
