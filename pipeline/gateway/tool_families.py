"""How models write that they call tools: one way for each family, and a plain one for the rest."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.gateway.grammars import JSON_OPTIONS, Grammar, GrammarKind
from pipeline.gateway.tool_use import ToolUse

# Where an answer has to be calls: a small model never stops.
_MAX_CALLS = 16
_Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """Calls are JSON objects of a name and of what the tool is called with, by this `key`.

    `opening` and `closing` stand around each, or around the list of all. Without `opening` a call
    is told by being JSON, and what begins otherwise has none.
    """

    name: str
    key: str = "arguments"
    opening: str = ""
    closing: str = ""
    is_list: bool = False
    # What models write between calls that have neither.
    between: str = "\n"
    # Of a call's id: templates may take no other when it comes back.
    id_prefix: str = "call_"
    id_chars: int = 24
    # What may stand around and between calls, and means nothing beside them.
    marks: tuple[str, ...] = ()


HERMES = ToolFamily(
    "hermes",
    opening="<tool_call>",
    closing="</tool_call>",
    marks=("<tool_call>", "</tool_call>"),
)
LLAMA3 = ToolFamily("llama3_json", key="parameters", between="; ", marks=("<|python_tag|>",))
MISTRAL = ToolFamily(
    "mistral",
    opening="[TOOL_CALLS]",
    is_list=True,
    marks=("[TOOL_CALLS]",),
    id_prefix="",
    id_chars=9,
)
PLAIN = ToolFamily("json")

FAMILIES: Mapping[str, ToolFamily] = {
    family.name: family for family in (HERMES, LLAMA3, MISTRAL, PLAIN)
}


def family_of(template: str, chosen: str | None = None) -> ToolFamily:
    """The one that is chosen by name, or that a chat template speaks. Raises InputError."""
    if chosen is not None:
        if chosen not in FAMILIES:
            raise InputError(f"there is no tool parser {chosen!r}, but {', '.join(FAMILIES)}")
        return FAMILIES[chosen]
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<|python_tag|>" in template or '"parameters"' in template:
        return LLAMA3
    return PLAIN


def calls_grammar(
    family: ToolFamily, use: ToolUse, answer: Grammar | None, token_of: Callable[[str], int | None]
) -> Grammar:
    """What an answer keeps to that is calls, or this one. `token_of`: of a text that is one."""
    names, schemas = list(use.parameters), list(use.parameters.values())
    heads = [f'{{"name": "{name}", "{family.key}": ' for name in names]
    objects = [f'{_quoted(head)} @call{i} "}}"' for i, head in enumerate(heads)]
    opening, closing = _mark(family.opening, token_of), _mark(family.closing, token_of)
    if family.is_list:
        start = f'{opening} "[" {_several("call", ", ", use)} "]" {closing}'
    elif family.opening:
        start = _several(f'{opening} "\\n" call "\\n" {closing}', "\n", use)
    else:
        start = _several("call", family.between, use)
    rules = ["start: calls" + ("" if use.must or answer is None else " | @answer")]
    rules += [f"calls: {start}", "call: " + " | ".join(objects)]
    grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join(rules)}]
    for i, schema in enumerate(schemas):
        grammars.append({"name": f"call{i}", "json_schema": _with_options(schema)})
    if not use.must and answer is not None:
        grammars.append({"name": "answer", "json_schema": _with_options(json.loads(answer.text))})
    return Grammar(GrammarKind.OWN, json.dumps({"grammars": grammars}), "tools")


def tools_in_words(
    messages: _Messages, tools: Sequence[Mapping[str, Any]], family: ToolFamily
) -> _Messages:
    """A conversation for a template that shows no tools: the system's message tells of them."""
    told = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    call = f'{{"name": NAME, "{family.key}": {{...}}}}'
    call = f"[{call}, ...]" if family.is_list else call
    text = (
        f"You may call these functions:\n{told}\n"
        "To call one, answer with nothing but JSON, a line for each call:\n"
        f"{family.opening}{call}{family.closing}"
    )
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def told_in_words(messages: _Messages) -> _Messages:
    """A conversation for a template that knows of no calls: they and their results are text."""
    return [_in_words(message) for message in messages]


def _in_words(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] in {"tool", "function"}:
        return {"role": "user", "content": f"The function returned:\n{message['content']}"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call.get("function") or {} for call in calls]
    called = [{key: each.get(key) for key in ("name", "arguments")} for each in functions]
    lines = [json.dumps(each, ensure_ascii=False) for each in called]
    text = "\n".join([message["content"], *lines] if message["content"] else lines)
    return {"role": message["role"], "content": text}


def _several(call: str, between: str, use: ToolUse) -> str:
    if use.at_most_one:
        return call
    return f"{call} ({_quoted(between)} {call}){{0,{_MAX_CALLS - 1}}}"


def _quoted(text: str) -> str:
    """As a grammar has it."""
    return json.dumps(text)


def _mark(text: str, token_of: Callable[[str], int | None]) -> str:
    """A mark's own token where it has one: text that spells it is another thing to the model."""
    if not text:
        return ""
    token_id = token_of(text)
    return _quoted(text) if token_id is None else f"<[{token_id}]>"


def _with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": JSON_OPTIONS}
