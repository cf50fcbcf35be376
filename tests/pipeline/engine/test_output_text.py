import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from pipeline.engine.output_text import StoppedText
from pipeline.engine.tokenizer import Tokenizer

END = "<|end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = HfTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END, special=True)])
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    library.save(str(path))
    return Tokenizer(path)


def read(tokenizer, said, stops, **options):
    """What comes out of a text that is said, and the stop string that ended it."""
    text = StoppedText(tokenizer, (), stops, **options)
    out = ""
    for token_id in tokenizer.encode(said):
        piece, is_stopped = text.push(token_id)
        out += piece
        if is_stopped:
            return out, text.stop
    return out + text.finish()[0], text.stop


@pytest.mark.parametrize(
    ("said", "stops", "expected"),
    [
        ("Yes<|end|>user", [], ("Yesuser", None)),
        ("Yes<|end|>user", [END], ("Yes", END)),
        ("Yes<|end|>user", ["s<|end|>u"], ("Ye", "s<|end|>u")),
        ("Yes<|end|>user", ["su"], ("Ye", "su")),  # by what is shown
        ("Yes<|end|>user", ["end"], ("Yesuser", None)),
        ("語<|end|>", [END], ("語", END)),
    ],
)
def test_special_tokens_are_not_shown_but_end_a_text_where_told(tokenizer, said, stops, expected):
    assert read(tokenizer, said, stops) == expected


def test_special_tokens_are_shown_if_wanted(tokenizer):
    assert read(tokenizer, "Yes<|end|>u", [], shows_special_tokens=True) == ("Yes<|end|>u", None)
    assert read(tokenizer, "Yes<|end|>u", ["en"], shows_special_tokens=True) == ("Yes<|", "en")


def test_what_ends_open_is_let_go_at_the_end(tokenizer):
    text = StoppedText(tokenizer, (), ["語x"])
    said = tokenizer.encode("a語")
    assert [text.push(token_id)[0] for token_id in said] == ["a", "", "", ""]
    assert text.num_decoded == 2
    assert text.finish() == ("語", False)
    text = StoppedText(tokenizer, (), ["\ufffd"])
    text.push(said[1])
    assert text.finish() == ("", True)
