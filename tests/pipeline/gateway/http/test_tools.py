"""Tools, by the released openai client, before a model that knows nothing."""

import json

import jsonschema
import openai
import pytest

from pipeline.gateway.templates import ChatTemplate
from tests.pipeline.gateway.http.openai_calls import MODEL, USER, fails, with_client
from tests.pipeline.gateway.random_engine import RandomEngine

PARAMETERS = {
    "type": "object",
    "$defs": {"unit": {"enum": ["C", "F"]}},
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]
SHOWN = (
    "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.items() | list }}{% endfor %}"
    "{% endfor %}{# MARK #}"
)
MARKS = {
    "hermes": "<tool_call>",
    "llama3_json": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "json": "",
}
LIKELY = '"}'


@pytest.fixture(scope="module", params=MARKS)
def chat(request):
    template = ChatTemplate.compile(SHOWN.replace("MARK", MARKS[request.param]), {})
    yield template
    template.close()


def create(**fields):
    return lambda client: client.chat.completions.create(model=MODEL, **fields)


def is_valid(call):
    arguments = json.loads(call.function.arguments)
    if call.function.name == "now":
        return arguments == {}
    jsonschema.validate(arguments, PARAMETERS)
    return call.function.name == "get_weather"


async def test_a_required_call_always_parses_in_every_family(start_gateway, tokenizer, chat):
    asked = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "n": 6}
    async with start_gateway(RandomEngine(tokenizer, LIKELY), chat=chat) as gateway:
        answer = await with_client(gateway, create(**asked))
        one = await with_client(gateway, create(**asked, parallel_tool_calls=False))
    calls = [choice.message.tool_calls for choice in answer.choices]
    assert all(is_valid(call) for each in calls for call in each)
    assert len({call.id for each in calls for call in each}) == sum(map(len, calls))
    assert {choice.finish_reason for choice in answer.choices} == {"tool_calls"}
    assert {choice.message.content for choice in answer.choices} == {None}
    assert {len(choice.message.tool_calls) for choice in one.choices} == {1}


async def test_a_named_call_streams_its_arguments_bit_by_bit(start_gateway, tokenizer, chat):
    choice = {"type": "function", "function": {"name": "get_weather"}}

    def use(client):
        with client.chat.completions.stream(
            model=MODEL, messages=USER, tools=TOOLS, tool_choice=choice
        ) as stream:
            events = list(stream)
            said = [event.delta for event in events if event.type == "content.delta"]
            assert "".join(said) == ""
            return [event.type for event in events], stream.get_final_completion().choices[0]

    async with start_gateway(RandomEngine(tokenizer, LIKELY), chat=chat) as gateway:
        kinds, final = await with_client(gateway, use)
    (call,) = final.message.tool_calls
    assert call.function.name == "get_weather"
    assert is_valid(call)
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    assert final.finish_reason == "tool_calls"


@pytest.fixture
def hermes():
    template = ChatTemplate.compile(SHOWN.replace("MARK", "<tool_call> <think>"), {})
    yield template
    template.close()


CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


async def test_a_model_that_may_call_says_what_it_likes(start_gateway, make_engine, hermes):
    engine = make_engine(text=f"<think>Hm.</think>\n\nLet me see.\n{CALL}\n{CALL}")
    async with start_gateway(engine, chat=hermes) as gateway:
        answer = await with_client(gateway, create(messages=USER, tools=TOOLS))
        one = await with_client(
            gateway, create(messages=USER, tools=TOOLS, parallel_tool_calls=False)
        )
        none = await with_client(gateway, create(messages=USER, tools=TOOLS, tool_choice="none"))
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Let me see.", "Hm.")
    assert [call.function.name for call in message.tool_calls] == ["now", "now"]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert len(one.choices[0].message.tool_calls) == 1
    assert one.usage.completion_tokens < answer.usage.completion_tokens
    assert none.choices[0].message.tool_calls is None
    assert CALL in none.choices[0].message.content
    assert none.choices[0].finish_reason == "stop"
    assert not any(generation.masks for generation in engine.generations)


async def test_thoughts_can_be_left_out_or_where_they_are(start_gateway, make_engine, hermes):
    async with start_gateway(make_engine(text="<think>Hm.</think>Yes"), chat=hermes) as gateway:
        for fields, content in (
            ({"include_reasoning": False}, "Yes"),
            ({"reasoning_format": "none"}, "<think>Hm.</think>Yes"),
        ):
            answer = await with_client(gateway, create(messages=USER, extra_body=fields))
            message = answer.choices[0].message
            assert message.content == content
            assert not hasattr(message, "reasoning_content")


async def test_templates_get_tools_and_earlier_calls_as_objects(
    start_gateway, make_engine, hermes, tokenizer
):
    call = {"name": "get_weather", "arguments": '{"city": "Ulm"}'}
    history = [
        *USER,
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    engine = make_engine()
    async with start_gateway(engine, chat=hermes) as gateway:
        await with_client(gateway, create(messages=history, tools=TOOLS))
        await with_client(gateway, create(messages=history))
    shown, without = (tokenizer.decode(each.prompt_ids) for each in engine.generations)
    assert shown.startswith('[{"type": "function", "function": {"name": "get_weather"')
    assert shown.endswith("<|assistant|>[('city', 'Ulm')]<|tool|>sunny")
    assert "get_weather" not in without


async def test_a_template_that_knows_of_no_tools_is_told_in_words(
    start_gateway, make_engine, tokenizer
):
    call = {"name": "now", "arguments": "{}"}
    history = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    engine = make_engine(text='{"name": "now", "arguments": {}}')
    async with start_gateway(engine) as gateway:
        answer = await with_client(gateway, create(messages=history, tools=TOOLS))
    prompt = tokenizer.decode(engine.generations[0].prompt_ids)
    assert prompt.startswith("<|system|>Be brief.\n\nYou may call")
    assert '"description": "The time."' in prompt
    assert '<|assistant|>{"name": "now", "arguments": {}}' in prompt
    assert "<|user|>The function returned:\nnoon" in prompt
    assert answer.choices[0].message.tool_calls[0].function.name == "now"


async def test_beside_tools_an_answer_may_be_of_a_schema(start_gateway, tokenizer, hermes):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 22]}}}
    asked = {"messages": USER, "tools": TOOLS, "response_format": form, "n": 8}
    async with start_gateway(RandomEngine(tokenizer, LIKELY), chat=hermes) as gateway:
        answer = await with_client(gateway, create(**asked))
    for choice in answer.choices:
        calls = choice.message.tool_calls
        assert all(is_valid(call) for call in calls or ())
        assert calls or choice.message.content in {"1", "22"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [TOOLS[1], {"type": "function", "function": {"name": 'a"b'}}]},
         "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]},
         "tools[0].function.parameters"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": TOOLS * 200}, "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
         "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}],
          "tool_choice": "required"}, "tools"),
    ],
    ids=lambda value: str(value)[-60:],
)  # fmt: skip
async def test_what_cannot_be_had_is_refused_by_name(start_gateway, make_engine, fields, param):
    engine = make_engine()
    ask = create(messages=USER, extra_body=fields)
    async with start_gateway(engine) as gateway:
        error = await fails(gateway, openai.BadRequestError, ask)
    assert error.param == param
    assert engine.generations == []


@pytest.mark.slow
async def test_a_hundred_calls_parse_in_every_family(start_gateway, tokenizer, chat):
    asked = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "n": 25}
    calls = []
    async with start_gateway(RandomEngine(tokenizer, LIKELY), chat=chat) as gateway:
        while len(calls) < 100:
            answer = await with_client(gateway, create(**asked))
            calls += [call for choice in answer.choices for call in choice.message.tool_calls]
    assert all(is_valid(call) for call in calls)
