"""What a conversation means for one model: its prompt, what the answer keeps to, how it is read."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.gateway.answer_parts import THINK, THINK_END, AnswerReader, ThoughtSplitter
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.continuations import TextOptions
from pipeline.gateway.errors import invalid
from pipeline.gateway.generation_order import Conversation, Order
from pipeline.gateway.grammars import Grammar, GrammarKind
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.tool_families import calls_grammar, told_in_words, tools_in_words
from pipeline.gateway.tool_parser import ToolParser


class Prompt(NamedTuple):
    """A rendered conversation, and whether the model has begun to think at its end."""

    text: str
    is_thinking: bool


def rendered(config: GatewayConfig, conversation: Conversation) -> Prompt:
    """The prompt. Raises ApiError, PromptError; blocks for a moment."""
    template, variables = config.chat_template, conversation.variables
    template.check_variables(tuple(variables), "chat_template_kwargs")
    messages: Sequence[Mapping[str, Any]] = conversation.messages
    tools = None if conversation.tools is None else conversation.tools.tools
    if "tool_calls" not in template.source:
        messages = told_in_words(messages)
    if not template.reads_tools and tools is not None:
        messages, tools = tools_in_words(messages, tools, config.tool_family), None
    if conversation.continues_last:
        text = template.render_open(messages, variables, tools)
        begun = str(messages[-1].get("content"))
    else:
        adds_turn = conversation.adds_turn
        text = template.render(
            messages, add_generation_prompt=adds_turn, variables=variables, tools=tools
        )
        begun = text if text.rstrip().endswith(THINK) else ""
    is_thinking = THINK in template.source and begun.rfind(THINK) > begun.rfind(THINK_END)
    return Prompt(text, is_thinking)


def kept_to(config: GatewayConfig, tokenizer: GatewayTokenizer, order: Order) -> Grammar | None:
    """What an order's texts have to keep to. Raises ApiError."""
    grammar = order.grammar
    if grammar is not None and order.ignores_eos:
        raise invalid("Such a text ends where it is whole.", "ignore_eos")
    use = None if order.conversation is None else order.conversation.tools
    if use is None or (grammar is None and not use.must):
        return grammar
    if grammar is not None and grammar.kind is not GrammarKind.JSON_SCHEMA:
        raise invalid("Beside tools an answer can keep to a JSON schema only.", grammar.param)
    if order.ignores_eos:
        raise invalid("Calls of tools end where they are whole.", "ignore_eos")
    return calls_grammar(config.tool_family, use, grammar, tokenizer.added_token)


def text_options(config: GatewayConfig, order: Order, *, is_thinking: bool) -> TextOptions:
    """How an order's texts are read and shown; `is_thinking`: so they begin."""
    conversation = order.conversation
    use = None if conversation is None else conversation.tools
    splits = (
        conversation is not None
        and conversation.splits_thoughts
        and THINK in config.chat_template.source
    )
    family = config.tool_family
    marks = {*family.marks} if use else set()
    marks |= {THINK, THINK_END} if splits else set()

    def new_reader() -> AnswerReader:
        return AnswerReader(
            ThoughtSplitter(is_thinking) if splits else None,
            None if use is None else ToolParser(family, use.parameters),
        )

    return TextOptions(
        order.shows_special_tokens,
        order.includes_stop,
        new_reader if use or splits else None,
        frozenset(marks),
        use is not None and use.at_most_one,
    )
