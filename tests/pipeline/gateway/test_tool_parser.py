"""Calls are told from text however it is cut, and what is no call stays text."""

import json
import random

import pytest

from pipeline.gateway.tool_families import HERMES, LLAMA3, MISTRAL, PLAIN
from pipeline.gateway.tool_parser import CallDelta, ToolParser

WEATHER = '{"name": "weather", "arguments": {"city": "Ulm {x}", "days": [1, {"a": "]}\\""}]}}'
TIME = '{"name": "time", "arguments": {}}'
ASKED = [("weather", {"city": "Ulm {x}", "days": [1, {"a": ']}"'}]}), ("time", {})]


def parameters(text):
    return text.replace('"arguments"', '"parameters"')


def parsed(family, pieces):
    """The text, each call's name and arguments, and how many calls are whole."""
    parser = ToolParser(family, ("weather", "time"))
    parts = [part for piece in pieces for part in parser.push(piece)] + [*parser.finish()]
    calls = {}
    for part in parts:
        if not isinstance(part, CallDelta):
            continue
        if part.id is not None:
            assert part.index == len(calls)
            calls[part.index] = [part.name, ""]
        calls[part.index][1] += part.arguments
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [tuple(call) for call in calls.values()], parser.num_ended


def pieces_of(text, seed):
    if seed is None:
        return [text]
    rng, pieces = random.Random(seed), []
    while text:
        size = rng.randint(1, 9) if seed else 1
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{TIME}</tool_call>", ""),
        (HERMES, f"So.\n\n<tool_call>{WEATHER}</tool_call><tool_call>{TIME}</tool_call>\n", "So."),
        (LLAMA3, f"{parameters(WEATHER)}; {parameters(TIME)}", ""),
        (LLAMA3, f"<|python_tag|>{parameters(WEATHER)};{parameters(TIME)}", ""),
        (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {TIME}]", ""),
        (MISTRAL, f"Let me see[TOOL_CALLS][{WEATHER},{TIME}]", "Let me see"),
        (PLAIN, f" {WEATHER}\n{TIME}\n", ""),
        (PLAIN, f"[{WEATHER}, {TIME}]", ""),
    ],
)
def test_each_familys_calls_are_found(family, text, said, seed):
    found, calls, num_ended = parsed(family, pieces_of(text, seed))
    assert found == said
    assert [(name, json.loads(arguments)) for name, arguments in calls] == ASKED
    assert num_ended == 2


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize(
    ("family", "call"),
    [
        (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "time"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "time", "arguments": "{\\"x\\": 1}"}</tool_call>'),
        (LLAMA3, '{"type": "function", "name": "time", "parameters": {"x": 1}}'),
    ],
)
def test_calls_written_in_another_order_are_found_once_they_are_whole(family, call, seed):
    text, [(name, arguments)], num_ended = parsed(family, pieces_of(call, seed))
    assert (text, name, json.loads(arguments), num_ended) == ("", "time", {"x": 1}, 1)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize(
    ("family", "text"),
    [
        (HERMES, "a < b, and <tool is no mark <"),
        (HERMES, WEATHER),
        (LLAMA3, '{"city": "Ulm"} is JSON, and no call'),
        (LLAMA3, f"Hello {WEATHER}"),
        (MISTRAL, "[TOOL_CALL"),
        (PLAIN, "[1, 2, 3]"),
        (PLAIN, '{"name": "unknown", "arguments": {}}'),
        (PLAIN, '{"name": "time", "argum'),
        (PLAIN, "  Hi \n there \n"),
        (PLAIN, ""),
    ],
)
def test_what_is_no_call_is_text_as_it_was(family, text, seed):
    assert parsed(family, pieces_of(text, seed)) == (text, [], 0)


def test_an_id_is_one_that_the_familys_templates_take_back():
    call = f"[TOOL_CALLS][{TIME}]"
    first, *_ = ToolParser(MISTRAL, ["time"]).push(call)
    assert len(first.id) == 9
    assert first.id.isalnum()


def test_arguments_are_passed_on_while_they_come():
    parser = ToolParser(HERMES, ["weather"])
    head = [*parser.push('<tool_call>{"name": "weather", "arguments": {"ci')]
    assert [(part.name, part.arguments) for part in head] == [("weather", ""), (None, '{"ci')]
    assert [part.arguments for part in parser.push('ty": "Ulm"}}')] == ['ty": "Ulm"}']
    assert [*parser.push("</tool_call>"), *parser.finish()] == []


def test_a_call_that_is_cut_off_is_not_whole():
    text, calls, num_ended = parsed(PLAIN, ['{"name": "time", "arguments": {"x": "tr'])
    assert (text, calls, num_ended) == ("", [("time", '{"x": "tr')], 0)


def test_a_long_text_takes_time_that_grows_with_its_length():
    """Attack: whoever makes the model write an endless object, to be read again at every token."""
    parser = ToolParser(PLAIN, ["time"])
    for _ in range(20_000):
        assert [*parser.push('{"a": [')] == []
