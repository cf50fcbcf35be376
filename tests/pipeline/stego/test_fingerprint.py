"""What both ends agree on, bound and compared."""

import pytest

from pipeline.errors import InputError
from pipeline.stego.errors import StegoError
from pipeline.stego.fingerprint import Fingerprint, Settings, parse_fingerprint

WHOLE = Fingerprint(
    config="c" * 64, tokenizer="t" * 64, weights="w" * 64, precision="int8", kernels="native",
    wire="exact",
)  # fmt: skip


def test_a_file_says_what_was_written():
    for fingerprint in (WHOLE, Fingerprint(top_k=0, codec="fimec")):
        assert parse_fingerprint(fingerprint.to_json().encode(), "file") == fingerprint


@pytest.mark.parametrize("change", [
    {"codec": "fimec"}, {"temperature": 0.5}, {"top_k": 0}, {"top_p": 0.9}, {"config": "d" * 64},
    {"tokenizer": "d" * 64}, {"precision": "float32"}, {"kernels": "torch"}, {"wire": "I8"},
])  # fmt: skip
def test_everything_but_weights_is_bound_and_named_where_it_differs(change):
    other = WHOLE.model_copy(update=change)
    assert other.context((1, 2)) != WHOLE.context((1, 2))
    (name, value), = change.items()  # fmt: skip
    assert other.differences(WHOLE).startswith(f"{name} is {str(value)[:16]}, and was ")


def test_the_prompt_is_bound():
    assert len({WHOLE.context(ids) for ids in ((1, 2), (1, 2, 3), (2, 1), ())}) == 4


def test_other_files_of_weights_are_named_but_bound_by_the_text_alone():
    other = WHOLE.model_copy(update={"weights": "v" * 64})
    assert other.context((1,)) == WHOLE.context((1,))
    assert "weights" in other.differences(WHOLE)


def test_what_one_side_does_not_say_differs_from_nothing():
    assert not WHOLE.differences(Fingerprint())
    assert not Fingerprint().differences(WHOLE)


@pytest.mark.parametrize("text", [
    b"", b"[]", b"{", b'{"codec": 5}', b'{"topk": 5}', b'{"temperature": "hot"}', b"\xff",
])  # fmt: skip
def test_what_is_no_fingerprint_is_refused_in_a_line(text):
    with pytest.raises(StegoError, match=r"^file is no fingerprint: .+$"):
        parse_fingerprint(text, "file")


def test_settings_are_what_comes_before_the_codec():
    sampling = Settings(temperature=0.7, top_k=-1, top_p=0.9).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 0, 0.9)


@pytest.mark.parametrize("settings", [Settings(temperature=0.0), Settings(top_k=1)])
def test_greedy_settings_are_refused(settings):
    with pytest.raises(StegoError, match="only the most likely"):
        _ = settings.sampling


@pytest.mark.parametrize("settings", [Settings(temperature=-1.0), Settings(top_p=2.0)])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError):
        _ = settings.sampling


def test_settings_that_mean_the_same_bind_the_same():
    same = [
        (Settings(top_k=-1), Settings(top_k=0)),
        (Settings(codec="fimec"), Settings(codec="fimec:block_bits=08")),
        (Settings(codec="fimec:block_bits=12"), Settings(codec="fimec:block_bits=012")),
    ]
    for one, other in same:
        assert one == other
    assert Settings(codec="fimec:block_bits=9") != Settings(codec="fimec")


@pytest.mark.parametrize("codec", ["a" * 300, "fimec:block_bits=" + "9" * 230, "range:x=1", ""])
def test_a_codec_that_there_is_not_is_refused_in_a_short_line(codec):
    with pytest.raises(StegoError) as refusal:
        Settings(codec=codec)
    assert len(str(refusal.value)) < 200


def test_a_difference_is_shown_as_far_as_it_can_be_seen():
    one, other = Fingerprint(codec="fimec:block_bits=10"), Fingerprint(codec="fimec:block_bits=9")
    shown = one.differences(other)
    assert shown == "codec is fimec:block_bits=10, and was fimec:block_bits=9"
