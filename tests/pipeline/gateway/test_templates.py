import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import PromptError, TokenizerError
from pipeline.gateway.errors import ApiError
from pipeline.gateway.templates import ChatTemplate

USER = [{"role": "user", "content": "Hi <you>"}]
# Real conventions: ChatML with trimmed blocks, Llama 3's date and role checks, Mistral's pairs.
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
STRICT = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{% generation %}{{ messages | tojson }}{% endgeneration %}
"""


def compiled(source, **special):
    return ChatTemplate.compile(source, special)


def test_chatml_renders_as_transformers_renders_it():
    assert compiled(CHATML).render(USER) == (
        "<|im_start|>user\nHi <you><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("source", [CHATML, STRICT.replace("tojson", "tojson(indent=2)")])
def test_rendering_equals_that_of_transformers(source):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [*USER, {"role": "assistant", "content": "é\n"}, *USER]
    expected, _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    assert compiled(source, bos_token="<s>").render(messages) == expected[0]


def test_a_templates_own_refusal_reaches_the_client():
    with pytest.raises(PromptError, match="roles must alternate"):
        compiled(STRICT).render([*USER, *USER])


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[9].role }}", "{{ nothing() }}"])
def test_a_template_that_breaks_is_a_refusal(source):
    with pytest.raises(PromptError, match="refuses these messages"):
        compiled(source).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(1000000) %}x{% endfor %}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(PromptError):
        compiled(source).render(USER)


DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x OP ns.x %}"
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "loops that print": "{% for i in range(99999) %}" * 2 + "x" * 999 + "{% endfor %}" * 2,
    "long string": "{{ messages[0].role * 10**9 }}",
    "longest string": "{{ messages[0].role * 10**18 }}",
    "long list": "{{ messages * 10**9 }}",
    "doubling": DOUBLING.replace("OP", "+") + "{% endfor %}{{ ns.x }}",
    "joining": DOUBLING.replace("OP", "~") + "{% endfor %}{{ ns.x }}",
    "power": "{{ (messages | length + 8) ** (9 ** 9 * 99) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "tree": "{% macro f(x) %}{% if x %}{{ f(x-1) ~ f(x-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "huge range": "{{ range(10**12) | list }}",
    "centred": "{{ messages[0].role | center(10**11) }}",
    "indented": "{{ (messages[0].role ~ '\n') * 10**6 | indent(10**6) }}",
    "formatted": "{{ '%1000000000d' | format(1) }}",
    "formatted too": "{{ '{:>10000000000}'.format(1) }}",
    "sums": "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "lorem ipsum": "{{ lipsum(10**9) }}",
    "json": "{{ range(99999) | list | tojson(indent=10000) }}",
    "a date": "{{ strftime_now('%Y' * (messages | length) * 10**8) }}",
}


def test_a_rendering_after_its_process_has_been_killed_is_served():
    template = compiled(CHATML)
    expected = template.render(USER)
    template._process._process.kill()
    template._process._process.wait()
    assert template.render(USER) == expected
    template.close()


# What computes is ended after two seconds: loops, and a single call of C, are enough of those here.
ENDED_LIKE_THOSE = {"tree", "sums", "sorting", "lorem ipsum", "json", "a date"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ENDED_LIKE_THOSE)) for name in HOSTILE],
)
def test_a_hostile_template_costs_seconds_and_megabytes_at_most(name):
    template = compiled(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    with pytest.raises(PromptError):
        template.render(USER)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert time.monotonic() - started < 120  # a second of computing, on a busy machine
    # None of it here: the gateway's own thread of Python is free meanwhile.
    assert after.ru_utime - before.ru_utime < 0.5
    assert after.ru_maxrss - before.ru_maxrss < 64 << 10
    template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{{ " + "[" * 3_000 + "]" * 3_000 + " }}",
        "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
        "{{ 1" + "|string" * 50_000 + " }}",
        pytest.param("{{ ('a ' * 10**7) | wordwrap(1) }}", marks=pytest.mark.slow),
    ],
    ids=["brackets", "lists", "blocks", "filters", "constants"],
)
def test_a_template_that_is_hostile_to_its_compiler_is_the_users_error(source):
    with pytest.raises(TokenizerError, match="does not compile"):
        compiled(source)


def test_one_conversation_that_breaks_a_template_leaves_the_next_alone():
    loop = "{% for i in range(messages[0].n) %}{{ range(99999) | sum }}{% endfor %}"
    template = compiled("{{ messages[0].content }}" + loop)
    fair, unfair = ([{"content": "x", "n": n}] for n in (0, 99999))
    assert template.render(fair) == "x"
    with pytest.raises(PromptError, match="too long, or too much memory"):
        template.render(unfair)
    assert template.render(fair) == "x"


def test_ordinary_conversations_hardly_notice_the_other_process():
    template = compiled(CHATML)
    messages = [{"role": "user", "content": "word " * 200}] * 10
    template.render(messages)
    times = []
    for _ in range(50):
        started = time.perf_counter()
        template.render(messages)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.02  # the quickest: what else the machine does is no cost of ours


def test_several_threads_take_turns():
    template = compiled("{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: template.render([{"content": f"<{i}>" * i}]), range(200)))
    assert texts == [f"<{i}>" * i for i in range(200)]


def test_the_process_goes_with_its_template():
    template = compiled(CHATML)
    process = template._process._process
    assert process.poll() is None
    del template
    assert process.poll() is not None


def test_the_directory_we_are_in_decides_nothing(tmp_path, monkeypatch):
    for name in ("json.py", "jinja2.py", "marshal.py", "struct.py"):
        (tmp_path / name).write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert compiled(CHATML).render(USER)


def test_a_refusal_is_a_line_not_a_book():
    with pytest.raises(PromptError) as caught:
        compiled("{{ raise_exception('x' * messages | length * 10**6) }}").render(USER)
    assert len(str(caught.value)) < 1000


THINKING = "{% if enable_thinking %}<think>{% endif %}{{ messages[0].content }}{{ bos_token }}"


def test_variables_reach_the_template_that_reads_them():
    template = compiled(THINKING, bos_token="<s>")
    assert template.variables == {"enable_thinking"}
    template.check_variables(["enable_thinking"], "kwargs")
    assert template.render(USER, variables={"enable_thinking": True}) == "<think>Hi <you><s>"


@pytest.mark.parametrize(
    "name", ["no_such", "messages", "bos_token", "add_generation_prompt", "range"]
)
def test_no_other_variables_are_taken(name):
    with pytest.raises(ApiError) as caught:
        compiled(THINKING, bos_token="<s>").check_variables(["enable_thinking", name], "kwargs")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", f"kwargs.{name}")


@pytest.mark.parametrize("content", ["I think ", "  padded", "I", "<|im_end|> x"])
@pytest.mark.parametrize("source", [CHATML, CHATML.replace(" | trim", "")], ids=["trims", "keeps"])
def test_going_on_with_a_message_is_as_transformers_has_it(source, content):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [*USER, {"role": "assistant", "content": content}]
    expected, _ = render_jinja_template(
        conversations=[messages], chat_template=source, continue_final_message=True
    )
    assert compiled(source).render_open(messages) == expected[0]


@pytest.mark.parametrize("content", ["", "  ", None])
def test_there_must_be_something_to_go_on_with(content):
    with pytest.raises(PromptError, match="last message"):
        compiled(CHATML).render_open([*USER, {"role": "assistant", "content": content or ""}])


def test_output_is_bounded():
    loop = "{% for i in range(10000) %}{% for j in range(10000) %}" + "x" * 1000
    with pytest.raises(PromptError, match="exceeds"):
        compiled(loop + "{% endfor %}{% endfor %}").render(USER)


def test_today_can_be_told():
    assert compiled("{{ strftime_now('%Y') }}").render(USER).startswith("20")


def test_json_is_not_escaped_for_html():
    assert compiled("{{ messages[0].content | tojson }}").render(USER) == '"Hi <you>"'


def write(directory, **config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_template_is_found_in_the_tokenizers_config(tmp_path):
    write(
        tmp_path,
        chat_template="{{ bos_token }}{{ eos_token }}{{ messages[0].content }}",
        bos_token={"content": "<s>", "lstrip": False},
        eos_token="</s>",
        unk_token=None,
    )
    assert ChatTemplate.load(tmp_path).render(USER) == "<s></s>Hi <you>"


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, chat_template=named)
    assert ChatTemplate.load(tmp_path).render(USER) == "d"


def test_a_template_file_wins(tmp_path):
    write(tmp_path, chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path).render(USER) == "file"


def test_without_a_template_chats_are_a_transcript_and_that_is_said(tmp_path, caplog):
    assert ChatTemplate.load(tmp_path).render(USER) == "User: Hi <you>\nAssistant:"
    assert "no_chat_template" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"chat_template": 3}', '{"chat_template": [{"name": "x"}]}', "[" * 100_000],
    ids=range(5),
)
def test_an_unusable_config_is_the_users_error(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TokenizerError):
        ChatTemplate.load(tmp_path)


def test_a_template_that_does_not_compile_is_the_users_error():
    with pytest.raises(TokenizerError, match="compile"):
        compiled("{% if %}")
