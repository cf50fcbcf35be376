"""Thoughts are told from what is said, however the text is cut."""

import pytest

from pipeline.gateway.answer_parts import AnswerReader, ThoughtSplitter
from pipeline.gateway.tool_families import HERMES
from pipeline.gateway.tool_parser import ToolParser


def read(text, size, *, is_thinking=False, tools=None):
    reader = AnswerReader(ThoughtSplitter(is_thinking), tools)
    cut = [text[at : at + size] for at in range(0, len(text), size)] or [""]
    parts = [reader.push(each, is_last=i + 1 == len(cut)) for i, each in enumerate(cut)]
    calls = [call for part in parts for call in part.calls]
    return "".join(p.reasoning for p in parts), "".join(p.text for p in parts), calls


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("is_thinking", "text", "thought", "said"),
    [
        (False, "<think>\nHm </ no.\n</think>\n\nYes <think>.", "Hm </ no.", "Yes <think>."),
        (True, "Hm.\n</think>\nYes", "Hm.", "Yes"),
        (False, "Just text </think>", "", "Just text </think>"),
        (False, "<thin", "", "<thin"),
        (False, "<think>cut off </th", "cut off </th", ""),
        (True, "</think>Yes", "", "Yes"),
        (False, "", "", ""),
    ],
)
def test_thoughts_come_before_what_is_said(is_thinking, text, thought, said, size):
    assert read(text, size, is_thinking=is_thinking)[:2] == (thought, said)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_tools_are_called_after_thinking_and_not_in_thoughts(size):
    call = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
    tools = ToolParser(HERMES, ["time"])
    thought, said, calls = read(f"<think>{call}</think>{call}", size, tools=tools)
    assert (thought, said) == (call, "")
    assert "".join(each.arguments for each in calls) == "{}"


@pytest.mark.parametrize("size", [1, 4, 100])
def test_what_comes_at_once_of_a_call_is_one_part_of_it(size):
    call = '<tool_call>{"name": "time", "arguments": {"zone": 1}}</tool_call>'
    reader = AnswerReader(None, ToolParser(HERMES, ["time"]))
    for at in range(0, 2 * len(call), size):
        calls = reader.push((2 * call)[at : at + size], is_last=False).calls
        assert len({each.index for each in calls}) == len(calls)
