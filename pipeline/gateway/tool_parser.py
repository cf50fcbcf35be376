"""The calls of tools in an answer's text, as it comes: sans-IO."""

import json
import re
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pipeline.gateway.tool_families import ToolFamily

# How a call begins whose arguments can be passed on while they come.
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.){1,64}")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MAX_HEAD_CHARS = 512
# Between calls of one answer.
_BETWEEN = " \t\r\n,;[]"


@dataclass(frozen=True, slots=True)
class CallDelta:
    """More of the `index`-th call: at first its id and name, then its arguments bit by bit."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class ToolParser:
    """Tells calls of known tools from text. What turns out to be no call is text, without marks."""

    def __init__(self, family: ToolFamily, names: Collection[str]) -> None:
        self._family = family
        self._names = frozenset(names)
        self._held = ""
        self._object: _Call | None = None
        # Whether nothing but blanks has come, and whether a call may come next.
        self._is_start = True
        self._in_calls = False
        self.num_calls = 0
        # Calls that are whole.
        self.num_ended = 0

    def push(self, text: str) -> Iterator[str | CallDelta]:
        """What is certain with this: text, and parts of calls."""
        self._held += text
        while self._held:
            before = self._held, self._in_calls, self._object
            if self._object is not None:
                yield from self._read_object(self._object)
            elif self._in_calls:
                yield from self._read_between()
            else:
                yield from self._read_text()
            if before == (self._held, self._in_calls, self._object):
                return  # it may become one thing or another

    def finish(self) -> Iterator[str | CallDelta]:
        """What was held back, now that no text follows."""
        call, self._object = self._object, None
        if call is not None and not call.is_told:
            yield call.skipped + call.text
        held, self._held = self._held, ""
        if held.strip() or not self.num_calls:
            yield held

    def _read_text(self) -> Iterator[str]:
        family, held = self._family, self._held
        places = [(at, mark) for mark in family.marks if (at := held.find(mark)) >= 0]
        if places:
            at, mark = min(places)
            text, self._held = held[:at].rstrip(), held[at + len(mark) :]
            self._in_calls = True
            if text:
                yield text
            return
        stripped = held.lstrip()
        if self._is_start and not family.opening and stripped[:1] in {"{", "["}:
            self._in_calls = True
            return
        # What may still become a mark, and blanks before one.
        keep = max((overlap(held, mark) for mark in family.marks), default=0)
        certain = held[: len(held) - keep].rstrip()
        if certain:
            self._is_start = False
            self._held = held[len(certain) :]
            yield certain

    def _read_between(self) -> Iterator[str]:
        held = self._held.lstrip(_BETWEEN)
        skipped = self._held[: len(self._held) - len(held)]
        for mark in self._family.marks:
            if held.startswith(mark):
                self._held = held[len(mark) :]
                return
            if held and mark.startswith(held):
                return
        if not held:
            if self.num_calls:
                self._held = ""
            return
        if held[0] == "{":
            self._object = _Call(skipped if not self.num_calls else "")
            self._held = held
            return
        self._in_calls, self._is_start = False, False
        self._held = held
        if skipped.strip() and not self.num_calls:
            yield skipped

    def _read_object(self, call: "_Call") -> Iterator[str | CallDelta]:
        held = self._held
        is_whole, num_read = call.read(held)
        self._held = held[num_read:]
        if (name := call.find_head(self._names)) is not None:
            yield self._begin(name)
        if call.is_told and (more := call.more_arguments()):
            yield CallDelta(self.num_calls - 1, more)
        if not is_whole:
            return
        self._object = None
        if call.is_told:
            self.num_ended += 1
            return
        found = call.whole(self._names)
        if found is None:
            self._in_calls = self._is_start = False
            yield call.skipped + call.text
            return
        name, arguments = found
        yield self._begin(name)
        yield CallDelta(self.num_calls - 1, arguments)
        self.num_ended += 1

    def _begin(self, name: str) -> CallDelta:
        self.num_calls += 1
        call_id = self._family.id_prefix + uuid.uuid4().hex[: self._family.id_chars]
        return CallDelta(self.num_calls - 1, "", call_id, name)


class _Call:
    """One JSON object as it comes."""

    def __init__(self, skipped: str) -> None:
        self.skipped = skipped
        self.text = ""
        # Whether its arguments are passed on while they come.
        self.is_told = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        # Of the text: where the arguments begin that are passed on, how far they have been, and
        # their end once that has come.
        self._told = 0
        self._end: int | None = None
        self._may_have_head = True

    def read(self, text: str) -> tuple[bool, int]:
        """Take the text up to the object's end; whether that has come, and how much was taken."""
        for i, char in enumerate(text):
            if self._in_string:
                self._read_string(char)
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 1 and self._end is None:
                    self._end = len(self.text) + i + 1
                if self._depth == 0:
                    self.text += text[: i + 1]
                    return True, i + 1
        self.text += text
        return False, len(text)

    def _read_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False

    def find_head(self, names: Collection[str]) -> str | None:
        """The name with which it turns out to begin as a call of one of these, once."""
        if not self._may_have_head:
            return None
        match = _HEAD.match(self.text)
        if match is None:
            self._may_have_head = len(self.text) < _MAX_HEAD_CHARS
            return None
        self._may_have_head = False
        name = str(json.loads(match[1]))
        self.is_told = name in names
        self._told = match.end()
        return name if self.is_told else None

    def more_arguments(self) -> str:
        end = len(self.text) if self._end is None else self._end
        more, self._told = self.text[self._told : end], max(end, self._told)
        return more

    def whole(self, names: Collection[str]) -> tuple[str, str] | None:
        """Name and arguments of a call that was not told by its head; None if it is none."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return None
        name = found.get("name")
        arguments = found.get("arguments", found.get("parameters", {}))
        if not isinstance(name, str) or name not in names:
            return None
        if isinstance(arguments, str):  # encoded twice
            return name, arguments
        return name, json.dumps(arguments or {}, ensure_ascii=False)


def overlap(text: str, mark: str) -> int:
    """How much of the text's end begins the mark."""
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if mark.startswith(text[-n:])), 0)
