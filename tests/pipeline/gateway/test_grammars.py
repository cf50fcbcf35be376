"""Every text that a grammar lets through keeps to it, and none takes more than it may."""

import json
import re
import time

import jsonschema
import numpy as np
import pytest
import trio
import trio.lowlevel

from pipeline.errors import InputError
from pipeline.gateway import grammars
from pipeline.gateway.errors import ApiError, Kind
from pipeline.gateway.grammars import MAX_GRAMMAR_CHARS, Grammar, GrammarKind
from pipeline.sampling.params import SamplingParams
from pipeline.sampling.sampler import Sampler
from tests.pipeline.gateway.random_texts import END, compiled, new_compiler, random_text

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-zäöü]{1,8}$"},
                "kind": {"enum": ["leaf", "Zweig ü", None, 3]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["name", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS = {
    "tree": TREE,
    "any of": {
        "anyOf": [{"type": "integer", "minimum": 3, "maximum": 1000}, {"const": {"a": [1]}}]
    },
    "open": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "tagged": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": k}, "v": v}, "required": ["k", "v"]}
            for k, v in (("n", {"type": "number"}), ("s", {"type": "string", "maxLength": 5}))
        ]
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
async def test_whatever_is_drawn_under_a_schema_validates(tokenizer, name):
    grammar = await compiled(tokenizer, "json_schema", json.dumps(SCHEMAS[name]))
    texts = {random_text(grammar, tokenizer, seed) for seed in range(12)} - {None}
    assert len(texts) > 3
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"(a|b)+[0-9]{3}", r"(a|b)+[0-9]{3}"),
        ("choice", '["yes", "no \\u00fc", "a\\nb"]', "yes|no ü|a\nb"),
        ("grammar", 'root ::= "a" rest\nrest ::= [0-9]+ "z" | "x"', r"a([0-9]+z|x)"),
        ("grammar", 'start: "a" NUM\nNUM: /[0-9]+/', r"a[0-9]+"),
    ],
)
async def test_whatever_is_drawn_under_other_grammars_keeps_to_them(tokenizer, kind, text, pattern):
    grammar = await compiled(tokenizer, kind, text)
    texts = {random_text(grammar, tokenizer, seed) for seed in range(20)} - {None}
    assert len(texts) > 1
    assert all(re.fullmatch(pattern, each) for each in texts)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", '{"not": {}}', '"not"'),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}',
         "uniqueItems"),
        ("json_schema", '{"type": "string", "format": "iban"}', "iban"),
        ("json_schema", '{"enum": []}', "nsatisfiable"),
        ("json_schema", '{"$ref": "http://127.0.0.1/x.json"}', "127.0.0.1"),
        ("json_schema", '{"oneOf": [{"type": "string"}, {"maxLength": 3}]}', "oneOf"),
        ("json_schema", '{"a":' * 150 + "1" + "}" * 150, "recursion"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", "(", "unclosed"),
        ("grammar", "nonsense", "nonsense"),
        ("grammar", "root ::= root", ""),
        ("choice", json.dumps(["a" * MAX_GRAMMAR_CHARS]), "characters"),
    ],
)  # fmt: skip
async def test_what_cannot_be_honoured_is_refused_by_name(tokenizer, kind, text, reason):
    with pytest.raises(ApiError) as caught:
        await compiled(tokenizer, kind, text)
    error = caught.value
    assert (error.kind, error.param) == (Kind.INVALID, "field")
    assert reason in error.message
    assert len(error.message.splitlines()) == 1


def hostile_schemas():
    yield {"type": "string", "pattern": "^.*a.{200}$"}
    yield {"type": "string", "pattern": "^(.*a){20,30}.{100}$"}
    yield {"enum": [f"value {i * 7919 % 100003}" for i in range(5_000)]}
    yield {"allOf": [{"anyOf": [{"pattern": f"{i}a{j}*b"} for j in range(4)]} for i in range(9)]}
    refs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(2000)}
    yield {"$defs": {**refs, "d2000": {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize("schema", [*hostile_schemas()], ids=lambda schema: str(schema)[:40])
async def test_a_hostile_schema_is_refused_or_ends_within_its_budget(tokenizer, schema):
    """Attack: texts that take all the time there is. The loop goes on meanwhile."""
    start, gaps = time.process_time(), []

    async def watch():
        while True:
            before = trio.current_time()
            await trio.lowlevel.checkpoint()
            gaps.append(trio.current_time() - before)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            mask = (await compiled(tokenizer, "json_schema", json.dumps(schema))).new_mask()
        except ApiError:
            mask = None
        nursery.cancel_scope.cancel()
    assert len(gaps) > 1
    token_ids, quote = [], tokenizer.encode('"a')
    try:
        while mask is not None and len(token_ids) < 600:
            allowed = mask.allowed(token_ids, tokenizer.vocab_size)
            wanted = [each for each in quote if allowed[each]] or np.flatnonzero(allowed).tolist()
            if wanted == [END]:
                break
            token_ids.append(wanted[-1])
    except InputError:
        pass
    assert time.process_time() - start < 5


async def test_a_text_whose_masks_take_too_long_fails_alone_and_new_grammars_wait_for_it(
    tokenizer, monkeypatch, autojump_clock
):
    monkeypatch.setattr(grammars, "_FIRST_NS", 0)
    monkeypatch.setattr(grammars, "_TOKEN_NS", 0)
    monkeypatch.setattr(grammars, "_BURST_NS", 0)
    monkeypatch.setattr(grammars, "_REST_FACTOR", 10**6)
    compiler = new_compiler(tokenizer)
    wanted = Grammar(GrammarKind.REGEX, "a+", "field")
    mask = (await compiler.compile(wanted, tokenizer.vocab_size)).new_mask()
    sampler = Sampler(SamplingParams(), (1,), masks=(mask,), vocab_size=tokenizer.vocab_size)
    how = sampler.next_draw()
    assert not any(how.allowed)
    error = sampler.no_choice()
    assert isinstance(error, InputError)
    assert "too long" in str(error)
    assert compiler.num_kept == 0
    before = trio.current_time()
    await compiler.compile(wanted, tokenizer.vocab_size)
    assert trio.current_time() - before > 1


async def test_what_is_costly_and_within_its_budget_is_waited_for_all_the_same(
    tokenizer, monkeypatch, autojump_clock
):
    """Attack: one form after another, each of which takes as much as it may."""
    monkeypatch.setattr(grammars, "_BURST_NS", 0)
    monkeypatch.setattr(grammars, "_REST_FACTOR", 10**7)
    monkeypatch.setattr(grammars, "_MAX_REST_SECONDS", 10**6)
    monkeypatch.setattr(grammars, "_TOKEN_NS", 10**12)
    compiler = new_compiler(tokenizer)

    async def waited(pattern):
        before = trio.current_time()
        wanted = Grammar(GrammarKind.REGEX, pattern, "field")
        return await compiler.compile(wanted, tokenizer.vocab_size), trio.current_time() - before

    first, _ = await waited("a+")
    _, for_compiling = await waited("b+")
    assert for_compiling > 1
    await trio.sleep(10**6)  # whatever that has taken
    first.new_mask().allowed((), tokenizer.vocab_size)
    _, for_ordinary = await waited("c+")
    await trio.sleep(10**6)
    monkeypatch.setattr(grammars, "_TOKEN_NS", 0)
    first.new_mask().allowed((), tokenizer.vocab_size)
    _, for_mask = await waited("d+")
    assert for_ordinary < 1 < for_mask
    assert compiler.num_kept == 4


async def test_a_burst_of_forms_waits_for_nothing(tokenizer, monkeypatch, autojump_clock):
    monkeypatch.setattr(grammars, "_BURST_NS", 10**15)
    compiler = new_compiler(tokenizer)
    before = trio.current_time()
    for number in range(30):
        wanted = Grammar(GrammarKind.REGEX, f"a{{{number + 1}}}", "field")
        await compiler.compile(wanted, tokenizer.vocab_size)
    assert trio.current_time() == before


async def test_who_asks_for_the_same_at_once_has_it_compiled_once(tokenizer, monkeypatch):
    compiler, num_compiled = new_compiler(tokenizer), []
    compile_ = compiler._compile
    monkeypatch.setattr(
        compiler, "_compile", lambda *args: num_compiled.append(1) or compile_(*args)
    )
    found = []

    async def ask():
        wanted = Grammar(GrammarKind.REGEX, "a+", "field")
        found.append(await compiler.compile(wanted, tokenizer.vocab_size))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    assert len(num_compiled) == 1
    assert len(set(map(id, found))) == 1


async def test_a_grammar_is_compiled_once_and_the_oldest_forgotten(tokenizer, monkeypatch):
    monkeypatch.setattr(grammars, "MAX_KEPT", 2)
    compiler, num_compiled = new_compiler(tokenizer), []
    compile_ = compiler._compile

    def counted(*args):
        num_compiled.append(1)
        return compile_(*args)

    monkeypatch.setattr(compiler, "_compile", counted)
    for i in (0, 1, 2, 2, 0):
        wanted = Grammar(GrammarKind.REGEX, f"a{{{i + 1}}}", "field")
        await compiler.compile(wanted, tokenizer.vocab_size)
    assert len(num_compiled) == 4
    assert compiler.num_kept == 2


async def test_masks_of_one_grammar_do_not_know_of_each_other(tokenizer):
    grammar = await compiled(tokenizer, "regex", "ab|cd")
    ids = {char: tokenizer.encode(char)[0] for char in "abcd"}
    one, two = grammar.new_mask(), grammar.new_mask()

    def allowed(mask, text):
        found = mask.allowed([ids[char] for char in text], tokenizer.vocab_size)
        return {char for char, token_id in ids.items() if found[token_id]}

    assert allowed(one, "") == {"a", "c"}
    assert allowed(one, "a") == {"b"}
    assert allowed(two, "") == {"a", "c"}
    assert allowed(two, "c") == {"d"}
    assert allowed(one, "a") == {"b"}  # as when its step is lost, and sent again
    assert allowed(one, "") == {"a", "c"}


async def test_what_a_text_keeps_to_may_begin_behind_a_token(tokenizer):
    grammar = await compiled(tokenizer, "regex", "ab")
    a, b, mark = tokenizer.encode("ab|")
    mask = grammar.new_mask(after=mark)

    def allowed(*token_ids):
        return np.flatnonzero(mask.allowed(token_ids, tokenizer.vocab_size)).tolist()

    anything = list(range(tokenizer.vocab_size))
    assert allowed() == allowed(b, b) == anything
    assert allowed(b, b, mark) == [a]
    assert allowed(b, b, mark, a) == [b]
    assert allowed(b, b, mark, a, b) == [END]
