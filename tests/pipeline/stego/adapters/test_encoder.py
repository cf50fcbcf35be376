import pytest

from pipeline.sampling.params import SamplingParams
from pipeline.stego.adapters.conditional import Conditioning
from pipeline.stego.adapters.encoder import NUM_TRIES, StegoEncoder, next_token_weights
from pipeline.stego.errors import StegoError
from pipeline.stego.keys import Secret
from tests.pipeline.stego.adapters.toys import (
    END,
    HOW,
    LETTERS,
    PROMPT,
    SECRET,
    ToyEngine,
    ToyTokenizer,
)  # fmt: skip

TOP_20 = Conditioning(SamplingParams(temperature=1.0, top_k=20))


def encoder(engine=None, secret=SECRET, how=TOP_20, codec="range", **options):
    return StegoEncoder(engine or ToyEngine(), secret, codec, how, **options)


@pytest.mark.parametrize("message", [b"\x00", b"\xff" * 64, "Größe 🙂", "x"])
def test_what_is_encoded_is_decoded_from_the_text(message):
    text = encoder().encode(message, "Dear all")
    expected = message.encode() if isinstance(message, str) else message
    assert encoder().decode(text, "Dear all") == expected
    assert encoder().decode(text + " \n ", "Dear all") == expected
    assert set(text) <= set(LETTERS)


@pytest.mark.parametrize("codec", ["fimec", "fimec:block_bits=10", "range"])
def test_every_codec_carries_messages_that_no_other_reads(codec):
    text = encoder(codec=codec).encode("meet at nine", "Dear all")
    assert encoder(codec=codec).decode(text, "Dear all") == b"meet at nine"
    for other in {"fimec", "fimec:block_bits=10", "range"} - {codec}:
        with pytest.raises(StegoError):
            encoder(codec=other).decode(text, "Dear all")


def test_the_text_was_read_before_it_is_handed_out():
    engine = ToyEngine()
    encoder(engine).encode(b"once", "Dear all")
    assert engine.num_runs >= 2  # more where a text ends in whitespace, which is written anew


class Untidy(ToyTokenizer):
    """Spells the first texts otherwise when it reads them again."""

    def __init__(self, num_bad):
        self.num_bad = num_bad

    def encode(self, text, *, add_special_tokens=True):
        ids = super().encode(text)
        if add_special_tokens or self.num_bad == 0:
            return ids
        self.num_bad -= 1
        return ids[:-1]


def test_a_text_that_becomes_other_tokens_is_written_anew():
    engine = ToyEngine()
    engine.tokenizer = Untidy(3)
    text = encoder(engine).encode(b"again", "Dear all")
    assert encoder().decode(text, "Dear all") == b"again"
    assert engine.tokenizer.num_bad == 0
    assert engine.num_runs >= 3 + 2


def test_texts_that_always_become_other_tokens_are_given_up():
    engine = ToyEngine()
    engine.tokenizer = Untidy(1000)
    with pytest.raises(StegoError, match="became the tokens again"):
        encoder(engine).encode(b"never", "Dear all")
    assert engine.num_runs == NUM_TRIES


def test_an_engine_that_computes_otherwise_each_time_is_found_out():
    class Noisy(ToyEngine):
        def logits(self, token_ids):
            return super().logits([self.num_runs, *token_ids[-2:]])

    with pytest.raises(StegoError, match="same logits twice"):
        encoder(Noisy()).encode(b"never", "Dear all")


def test_an_engine_that_takes_other_tokens_is_found_out():
    class Willful(ToyEngine):
        """Does not tell the callback what it has taken."""

        def generate(self, prompt_ids, request, max_tokens):
            return [(each + 1) % END for each in super().generate(prompt_ids, request, max_tokens)]

    with pytest.raises(StegoError, match="other tokens than those chosen"):
        encoder(Willful()).encode(b"never", "Dear all")


def test_a_text_without_room_says_how_much_it_carries():
    with pytest.raises(StegoError, match=r"after 40 tokens, which carry \d+ bits"):
        encoder(max_tokens=40).encode(b"x" * 200, "Dear all")


@pytest.mark.parametrize("message", [b"", b"x" * 70_000])
def test_messages_that_are_empty_or_too_long_are_refused(message):
    with pytest.raises(StegoError):
        encoder().encode(message, "Dear all")


@pytest.mark.parametrize(
    "reader",
    [
        encoder(secret=Secret(key=bytes(32))),
        encoder(how=Conditioning(SamplingParams(temperature=0.9, top_k=20))),
        encoder(how=Conditioning(SamplingParams(temperature=1.0, top_k=19))),
    ],
)
def test_another_secret_or_conditioning_reads_nothing(reader):
    text = encoder().encode(b"for you", "Dear all")
    with pytest.raises(StegoError, match="wrong secret, model or settings"):
        reader.decode(text, "Dear all")


@pytest.mark.parametrize(
    "alter",
    [
        lambda text: text[:-1],
        lambda text: text[:20],
        lambda text: text + "a",
        lambda text: text[1:],
        lambda text: text[:30] + text[31:],
        lambda text: text[:-1] + ("a" if text[-1] != "a" else "b"),
        lambda text: "",
        lambda text: "  \n",
    ],
)
def test_an_altered_text_reads_nothing(alter):
    text = encoder().encode(b"for you", "Dear all")
    with pytest.raises(StegoError):
        encoder().decode(alter(text), "Dear all")


def test_another_prompt_reads_nothing():
    text = encoder().encode(b"for you", "Dear all")
    with pytest.raises(StegoError):
        encoder().decode(text, "Dear nobody")


def test_the_distribution_after_a_prompt_is_the_engines():
    weights = next_token_weights(ToyEngine(), PROMPT, HOW)
    assert weights.ids.size == 20
    assert END not in weights.ids
