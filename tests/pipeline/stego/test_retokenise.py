"""Who reads a text comes upon its tokens, or it is known that nobody does."""

import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pipeline.engine.tokenizer import Tokenizer
from pipeline.stego.retokenise import CoverTokenizer


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    """One that puts a mark before each word, and so before the text, as Llama's does."""
    words = ["▁", "▁the", "▁cat", "▁sat", "the", "cat", "a", "t", "\n"]
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}}
    vocab |= {word: 257 + i for i, word in enumerate(words)}
    raw = HfTokenizer(
        models.Unigram([(word, -1.0 * (i < 257) * 20 - 1) for i, word in enumerate(vocab)], 0, True)
    )
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    raw.save(str(path))
    return CoverTokenizer(Tokenizer(path))


def tokens(cover_tokenizer, *texts):
    """The tokens of these texts, one behind the other."""
    return tuple(token_id for text in texts for token_id in cover_tokenizer.ids(text))


@pytest.mark.parametrize("text", [" hello there", "hello", "\nin an end. ", "", "  a b"])
def test_a_text_of_its_own_tokens_survives(cover_tokenizer, text):
    ids = cover_tokenizer.ids(text)
    assert cover_tokenizer.cover(ids) == text
    assert cover_tokenizer.survives(ids, len(cover_tokenizer.ids(text.rstrip())))
    assert cover_tokenizer.may_survive(ids)


def test_tokens_that_are_one_token_together_do_not_survive(cover_tokenizer):
    ids = tokens(cover_tokenizer, "so ", "a", "n", " more to come")
    assert not cover_tokenizer.survives(ids, len(ids))
    assert not cover_tokenizer.may_survive(ids)
    assert not cover_tokenizer.survives(ids, 3)  # a model's own text has none of them anywhere


def test_the_last_tokens_may_yet_become_others(cover_tokenizer):
    assert cover_tokenizer.may_survive(tokens(cover_tokenizer, "so ", "a", "n"))


def test_a_text_that_needs_its_whitespace_at_the_end_does_not_survive(cover_tokenizer):
    ids = cover_tokenizer.ids("a b\n\n")
    assert cover_tokenizer.survives(ids, 3)
    assert not cover_tokenizer.survives(ids, len(ids))


def test_marks_and_rows_beyond_the_vocabulary_are_left_out(cover_tokenizer):
    tokenizer = cover_tokenizer.tokenizer
    allowed = cover_tokenizer.mask.allowed((), 256)
    (end,) = tokenizer.encode("<|end|>")
    assert not allowed[end]
    assert np.flatnonzero(allowed).tolist() == list(tokenizer.text_token_ids)
    assert len(tokenizer.text_token_ids) == tokenizer.vocab_size - 1


@pytest.mark.parametrize("text", [" the cat", " sat a", "the cat"])
def test_a_space_at_the_start_is_kept_by_tokenizers_that_put_one_there(word_tokenizer, text):
    ids = word_tokenizer.ids(text)
    assert word_tokenizer.cover(ids) == text
    assert word_tokenizer.survives(ids, len(ids))
