"""Which family a model is of, and that its own tokens mark its calls."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.engine.generation import TokenOutput
from pipeline.engine.request import FinishReason
from pipeline.errors import InputError
from pipeline.gateway.answer_parts import AnswerReader
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.continuations import ChoiceText, TextOptions
from pipeline.gateway.grammars import GrammarCompiler
from pipeline.gateway.tool_families import (
    FAMILIES,
    HERMES,
    LLAMA3,
    MISTRAL,
    PLAIN,
    calls_grammar,
    family_of,
)
from pipeline.gateway.tool_parser import ToolParser
from pipeline.gateway.tool_use import ToolUse

TOOLS = ({"type": "function", "function": {"name": "now"}},)


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("... <tool_call>\n{{ tool_call | tojson }}\n</tool_call>", HERMES),
        ("{{ '[TOOL_CALLS][' }}", MISTRAL),
        ("""{{- '{"name": "' + name + '", "parameters": ' }}""", LLAMA3),
        ("{{ '<|python_tag|>' }}", LLAMA3),
        ("{{ messages }}", PLAIN),
    ],
)
def test_a_template_tells_its_family_unless_one_is_named(template, family):
    assert family_of(template) is family
    for name, named in FAMILIES.items():
        assert family_of(template, name) is named


def test_there_is_no_family_of_another_name():
    with pytest.raises(InputError, match="hermes"):
        family_of("", "pythonic")


@pytest.fixture
def marked(tmp_path):
    """A tokenizer with a token of its own for the mark, which is not shown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(each, special=True) for each in ("</s>", "[TOOL_CALLS]")])
    path = tmp_path / "tokenizer.json"
    raw.save(str(path))
    return GatewayTokenizer(path)


async def test_a_call_begins_with_the_marks_own_token_and_is_read_from_it(marked):
    use = ToolUse(TOOLS, must=True, at_most_one=True)
    grammar = calls_grammar(MISTRAL, use, None, marked.added_token)
    compiler = GrammarCompiler(marked, frozenset({256}))
    mask = (await compiler.compile(grammar, marked.vocab_size)).new_mask()
    token_ids = []
    while not (allowed := mask.allowed(token_ids, marked.vocab_size))[256]:
        token_ids.append(int(np.flatnonzero(allowed)[-1]))
    assert token_ids[0] == 257
    assert json.loads(marked.decode(token_ids)) == [{"name": "now", "arguments": {}}]
    options = TextOptions(
        new_reader=lambda: AnswerReader(None, ToolParser(MISTRAL, ["now"])),
        shown=frozenset(MISTRAL.marks),
    )
    choice = ChoiceText(0, marked, (), (), options)
    pieces = [choice.push(TokenOutput(each, None, (), None)) for each in token_ids]
    pieces.append(choice.push(TokenOutput(256, None, (), FinishReason.EOS)))
    calls = [call for piece in pieces for call in piece.calls]
    assert "".join(piece.text for piece in pieces) == ""
    assert calls[0].name == "now"
    assert json.loads("".join(call.arguments for call in calls)) == {}
    assert pieces[-1].finish == "tool_calls"
