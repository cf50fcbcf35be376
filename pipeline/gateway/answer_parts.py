"""What an answer's text is made of: what was thought, what is said, the tools that are called."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

from pipeline.gateway.tool_parser import CallDelta, ToolParser, overlap

THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Parts:
    """What became certain of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


class ThoughtSplitter:
    """Tells what a model thinks aloud, before anything else, from what it says."""

    def __init__(self, is_thinking: bool) -> None:
        """`is_thinking`: the prompt ends in its having begun to."""
        self._is_thinking = is_thinking
        self._is_start = not is_thinking
        # Whether any thought has come, and whether all have and nothing else.
        self._has_begun = False
        self._has_thought = False
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """What is certain: of the thoughts, and of what is said."""
        self._held += text
        if self._is_start:
            stripped = self._held.lstrip()
            if THINK.startswith(stripped) and stripped != THINK:
                return "", ""
            self._is_start = False
            if stripped.startswith(THINK):
                self._is_thinking = True
                self._held = stripped.removeprefix(THINK)
        return self._think() if self._is_thinking else ("", self._say())

    def _think(self) -> tuple[str, str]:
        if not self._has_begun:
            self._held = self._held.lstrip()
            self._has_begun = bool(self._held)
        thought, mark, said = self._held.partition(THINK_END)
        if mark:
            self._is_thinking, self._has_thought = False, True
            self._held = said
            return thought.rstrip(), self._say()
        # What may still become the mark, and blanks before it.
        certain = thought[: len(thought) - overlap(thought, THINK_END)].rstrip()
        self._held = thought[len(certain) :]
        return certain, ""

    def _say(self) -> str:
        said, self._held = self._held, ""
        if self._has_thought:  # blanks are between the two
            said = said.lstrip()
            self._has_thought = not said
        return said

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no text follows."""
        held, self._held = self._held, ""
        return (held, "") if self._is_thinking else ("", held)


class AnswerReader:
    """Takes an answer's text as it comes; each of the two, where it is looked for."""

    def __init__(self, thoughts: ThoughtSplitter | None, tools: ToolParser | None) -> None:
        self._thoughts = thoughts
        self._tools = tools

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return 0 if self._tools is None else self._tools.num_calls

    @property
    def num_ended(self) -> int:
        """Calls that are whole."""
        return 0 if self._tools is None else self._tools.num_ended

    def push(self, text: str, *, is_last: bool) -> Parts:
        """What became certain with this text."""
        reasoning, said = ("", text) if self._thoughts is None else self._thoughts.push(text)
        if is_last and self._thoughts is not None:
            more, rest = self._thoughts.finish()
            reasoning, said = reasoning + more, said + rest
        if self._tools is None:
            return Parts(said, reasoning)
        found = [*self._tools.push(said), *(self._tools.finish() if is_last else ())]
        return Parts(_joined(found), reasoning, tuple(_calls(found)))


def _joined(parts: Iterable[str | CallDelta]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def _calls(parts: Iterable[str | CallDelta]) -> Iterator[CallDelta]:
    """The parts of calls, one of each: clients may read no second one of the same in a chunk."""
    calls = (part for part in parts if isinstance(part, CallDelta))
    for _, same in groupby(calls, attrgetter("index")):
        first, *others = same
        yield replace(first, arguments="".join(part.arguments for part in (first, *others)))
