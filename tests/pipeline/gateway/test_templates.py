import json

import pytest

from pipeline.errors import PromptError, TokenizerError
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
