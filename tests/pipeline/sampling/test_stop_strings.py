import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sampling.stop_strings import StopChecker

TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


def reference(text, stops):
    """The text up to the stop string that is complete first, the longest if several are."""
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(complete)], True
    return text, False


def stream(pieces, stops):
    checker = StopChecker(stops)
    emitted = []
    for piece in pieces:
        text, is_stopped = checker.push(piece)
        emitted.append(text)
        if is_stopped:
            return emitted, True
    return [*emitted, checker.finish()], False


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "is_stopped"),
    [
        (["hello"], [], "hello", False),
        (["hello\n", "world"], ["\n"], "hello", True),
        (["one st", "op two"], ["stop"], "one ", True),
        (["one st", "ill"], ["stop"], "one still", False),
        (["xab", "c"], ["abcd", "bc"], "xa", True),
        (["xabc"], ["bc", "abc"], "x", True),
        (["aab"], ["ab"], "a", True),
        (["tail st"], ["stop"], "tail st", False),
        (["stop"], ["stop"], "", True),
        (["日本", "語です"], ["語"], "日本", True),
    ],
)
def test_text_ends_just_before_the_stop_string(pieces, stops, expected, is_stopped):
    emitted, stopped = stream(pieces, stops)
    assert ("".join(emitted), stopped) == (expected, is_stopped)


@settings(max_examples=100)
@given(TEXT, STOPS, st.data())
def test_pieces_make_no_difference(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    emitted, is_stopped = stream(pieces, stops)
    assert ("".join(emitted), is_stopped) == reference(text, stops)


@settings(max_examples=100)
@given(TEXT, STOPS)
def test_nothing_is_emitted_early_and_nothing_held_needlessly(text, stops):
    checker = StopChecker(stops)
    emitted = ""
    for end, char in enumerate(text, 1):
        piece, is_stopped = checker.push(char)
        emitted += piece
        if is_stopped:
            break
        held = text[len(emitted) : end]
        longest = max(
            (n for n in range(end + 1) for stop in stops if stop.startswith(text[end - n : end])),
            default=0,
        )
        assert len(held) == longest


def test_the_stop_string_that_was_found_is_told():
    checker = StopChecker(["bc", "abc", "x"])
    assert checker.found is None
    checker.push("aabcx")
    assert checker.found == "abc"


def test_after_the_end_nothing_more_comes_out():
    checker = StopChecker(["b"])
    assert checker.push("ab") == ("a", True)
    assert checker.push("aaa") == ("", True)
    assert checker.finish() == ""


SPECIALS = ["<e>", "b<e>"]
# Pieces of text that is shown, and special tokens, which are not.
MIXED = st.lists(st.one_of(st.text("ab<e>", max_size=4), st.sampled_from(SPECIALS).map(list)))
MIXED_STOPS = st.lists(
    st.one_of(
        st.text("ab<e>", min_size=1, max_size=5),
        st.sampled_from(["<e>", "a<e>", "<e>b", "<e><e>", "ab<e>ab"]),
    ),
    max_size=3,
)


def mixed_reference(pieces, stops):
    """Shown text up to the stop string complete first: alone, or among the special tokens."""
    marked = [stop for stop in stops if any(special in stop for special in SPECIALS)]
    shown, full, before = "", "", []
    for piece in pieces:
        for char in piece:
            before.append(len(shown))
            full += char
            starts = [before[len(full) - len(s)] for s in marked if full.endswith(s)]
            if isinstance(piece, str):
                shown += char
                starts += [len(shown) - len(s) for s in stops if shown.endswith(s)]
            if starts:
                return shown[: min(starts)], True
    return shown, False


@settings(max_examples=100)
@given(MIXED, MIXED_STOPS)
def test_a_stop_string_with_a_special_token_matches_though_none_is_shown(pieces, stops):
    checker = StopChecker(stops, SPECIALS)
    emitted, is_stopped = "", False
    for piece in pieces:
        text, is_stopped = checker.push("".join(piece), is_shown=isinstance(piece, str))
        emitted += text
        if is_stopped:
            break
    emitted += checker.finish()
    assert (emitted, is_stopped) == mixed_reference(pieces, stops)
    assert checker.found in stops if is_stopped else checker.found is None


def test_a_special_token_is_held_only_by_a_stop_string_that_spells_it():
    checker = StopChecker(["a<e>b", "x"], ["<e>"])
    assert checker.push("a") == ("", False)
    assert checker.push("<e>", is_shown=False) == ("", False)
    assert checker.push("c") == ("ac", False)
    checker = StopChecker(["a", "x"], ["<e>"])
    assert checker.push("<e>", is_shown=False) == ("", False)
    assert checker.push("c") == ("c", False)
