"""Texts that keep to a grammar: a JSON schema, a regular expression, choices, rules.

A grammar is tried in a process of its own (`grammar_checker`), then compiled for the model's
tokenizer in a thread, and kept. From then on it says for every text so far which tokens may
follow. That is a mask as any other: it is computed here, on the user's side, and
travels with the step whose token it is for, so that the last stage draws as ever and learns of the
schema only what may come next.

llguidance does it, rather than outlines or xgrammar: it builds no automaton of a whole schema
beforehand, so that a compilation takes a millisecond and a mask some microseconds; what it does is
bounded by fuel; a keyword that it cannot honour is an error with a name; and it brings no torch.
"""

import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import trio

from pipeline.errors import InputError
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.errors import ApiError, invalid
from pipeline.gateway.kept_process import KeptProcess
from pipeline.sampling.masks import Allowed, PackedMask

if TYPE_CHECKING:  # who needs it waits for it, once
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Of all that a grammar is written as; hundreds of tools have less.
MAX_GRAMMAR_CHARS = 1 << 18
# Compiled ones that are kept, and the states of each, of up to 2 kB.
MAX_KEPT = 32
_MAX_LEXER_STATES = 1 << 14
# What one mask may take, in llguidance's measure: some milliseconds. Ordinary ones take a tenth.
_MASK_FUEL = 50_000
# What the masks of a grammar's texts may take: at first, and for each token. Ordinary ones take a
# twentieth of a millisecond, and a step takes five at least.
_FIRST_NS = 100_000_000
_TOKEN_NS = 250_000
# What compiling takes, and masks beyond the ordinary, is followed by so many times as long without
# compiling, a minute at most, but for a first half of a second: whoever sends one after another
# costs others a twentieth of their tokens.
_REST_FACTOR = 19
_BURST_NS = 500_000_000
_MAX_REST_SECONDS = 60.0
_MAX_REASON_CHARS = 400
_CHECKER = Path(__file__).with_name("grammar_checker.py")

# Between a text's parts: one blank, or a new line and its indentation. JSON has any number of both,
# and small models never stop.
JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\n[ \t]{0,24}| )",
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}


class GrammarKind(Enum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    RULES = "grammar"  # Lark's or llama.cpp's
    OWN = "llguidance"  # several that refer to each other by name


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text has to keep to, and which field of a request said so; choices as a JSON list."""

    kind: GrammarKind
    text: str
    param: str


_Key = tuple[GrammarKind, str]


class GrammarCompiler:
    """Compiles grammars for one model's tokenizer, and keeps what it has compiled."""

    def __init__(self, tokenizer: GatewayTokenizer, end_ids: frozenset[int]) -> None:
        self._text_tokenizer = tokenizer
        self._end_ids = sorted(end_ids)
        # One after another: attackers get one processor at most.
        self._turn = trio.Lock()
        # What the last one took.
        self._spent_ns = 0
        self._tokenizer: LLTokenizer | None = None
        self._checker: KeptProcess | None = None
        self._kept: OrderedDict[_Key, CompiledGrammar] = OrderedDict()
        self._rest_until = -math.inf

    @property
    def num_kept(self) -> int:
        """Grammars that need not be compiled again."""
        return len(self._kept)

    async def compile(self, grammar: Grammar, vocab_size: int) -> "CompiledGrammar":
        """Compile it, or find it. Raises ApiError that says why it cannot be honoured."""
        key = (grammar.kind, grammar.text)
        if key not in self._kept:
            if len(grammar.text) > MAX_GRAMMAR_CHARS:
                raise _refused(grammar, f"it has more than {MAX_GRAMMAR_CHARS} characters")
            async with self._turn:
                found = self._kept.get(key) or await self._compile_rested(grammar, vocab_size)
            self._kept[key] = found
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    async def _compile_rested(self, grammar: Grammar, vocab_size: int) -> "CompiledGrammar":
        await trio.sleep_until(self._rest_until)
        self._spent_ns = 0
        try:
            matcher = await trio.to_thread.run_sync(self._compile, grammar, vocab_size)
        finally:
            self._charge(self._spent_ns)
        key = (grammar.kind, grammar.text)
        return CompiledGrammar(matcher, self._charge, lambda: self._kept.pop(key, None))

    def _charge(self, time_ns: int) -> None:
        """Have the next compilation wait for what this one, or one's masks, took of others' time.

        Attack: forms that are costly and yet within what each may take, one after another.
        """
        now, factor = trio.current_time(), _REST_FACTOR / 1e9
        begun = max(self._rest_until, now - factor * _BURST_NS)
        self._rest_until = min(begun + factor * time_ns, now + _MAX_REST_SECONDS)

    def _compile(self, grammar: Grammar, vocab_size: int) -> "LLMatcher":
        source = self._checked(grammar)
        try:
            tokenizer = self._load_tokenizer(vocab_size)
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
        start_ns = time.thread_time_ns()
        try:
            return self._matcher(grammar, source, tokenizer)
        finally:
            self._spent_ns = time.thread_time_ns() - start_ns

    @staticmethod
    def _matcher(grammar: Grammar, source: str, tokenizer: "LLTokenizer") -> "LLMatcher":
        from llguidance import LLMatcher  # noqa: PLC0415

        matcher = LLMatcher(tokenizer, source, log_level=0, limits=_limits())
        # The first mask takes longest, and tells grammars that no text keeps to.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return matcher

    def _checked(self, grammar: Grammar) -> str:
        """As llguidance has it. Raises ApiError where it is no grammar, or takes too much.

        Attack: rules that refer to each other a thousand deep end the process that compiles them.
        """
        asked = {"kind": grammar.kind.value, "text": grammar.text, "json_options": JSON_OPTIONS}
        checker = self._checker
        if checker is None or not checker.is_running:
            self._checker = checker = KeptProcess(_CHECKER)
        with checker.watched():
            with suppress(OSError):  # it has ended; so does its answer
                checker.requests.write(json.dumps(asked).encode() + b"\n")
                checker.requests.flush()
            line = checker.answers.readline()
        if not line:
            checker.end()
            raise _refused(grammar, "it takes too much time or memory")
        answer = json.loads(line)
        if "error" in answer:
            raise _refused(grammar, answer["error"])
        return str(answer["source"])

    def _load_tokenizer(self, vocab_size: int) -> "LLTokenizer":
        from llguidance import LLTokenizer  # noqa: PLC0415

        if not self._end_ids:
            raise ValueError("the model has no token that ends a text")
        if self._tokenizer is None:
            num_ids = max(vocab_size, self._text_tokenizer.num_ids)
            spelled = self._text_tokenizer.spelled()
            self._tokenizer = LLTokenizer(spelled, n_vocab=num_ids, eos_token=self._end_ids)
        return self._tokenizer


class CompiledGrammar:
    """One that texts can be held to, and what that has taken."""

    def __init__(
        self, matcher: "LLMatcher", charge: Callable[[int], None], give_up: Callable[[], object]
    ) -> None:
        """`charge` hears what masks take beyond the ordinary, in ns; `give_up` that it is over."""
        self._matcher = matcher
        self._charge = charge
        self._give_up = give_up
        self._num_masks = 0
        self._spent_ns = 0

    def new_mask(self, after: int | None = None) -> "GrammarMask":
        """For one text, or for what follows its first token of this id."""
        return GrammarMask(self._matcher.deep_copy(), self, after)

    def spend(self, time_ns: int, failure: str) -> None:
        """Account for one more mask, and for how it has failed. Raises InputError for too much.

        Attack: a pattern whose every mask takes milliseconds, which all others wait for.
        """
        self._num_masks += 1
        self._spent_ns += time_ns
        if time_ns > _TOKEN_NS:
            self._charge(time_ns - _TOKEN_NS)
        if not failure and self._spent_ns > _FIRST_NS + _TOKEN_NS * self._num_masks:
            failure = "it takes too long to hold a text to it"
        if failure:
            self._give_up()
            raise InputError(f"the text cannot go on as asked for: {_line(failure)}")


class GrammarMask(PackedMask):
    """Which tokens one text may go on with."""

    def __init__(
        self, matcher: "LLMatcher", grammar: CompiledGrammar, after: int | None = None
    ) -> None:
        self._matcher = matcher
        self._grammar = grammar
        self._after = after
        self._num_taken = 0
        self._bits = b""

    def allowed(self, generated: Sequence[int], vocab_size: int, /) -> Allowed | None:
        """As `Mask.allowed`. Raises InputError where that takes too much."""
        bits = np.frombuffer(self.packed(generated, vocab_size), np.uint8)
        return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)

    def packed(self, generated: Sequence[int], vocab_size: int, /) -> bytes:
        """As `PackedMask.packed`. Raises InputError where that takes too much."""
        num_bytes = -(-vocab_size // 8)
        if self._after is not None:
            if self._after not in generated:  # a mask all the same: no size tells when it comes
                return b"\xff" * num_bytes
            generated = generated[generated.index(self._after) + 1 :]
        if not self._bits or len(generated) != self._num_taken:
            self._advance(generated)
        return self._bits[:num_bytes]

    def _advance(self, generated: Sequence[int]) -> None:
        matcher = self._matcher
        start_ns = time.thread_time_ns()
        if len(generated) < self._num_taken:  # a text that goes on otherwise
            matcher.reset()
            self._num_taken = 0
        matcher.consume_tokens(list(generated[self._num_taken :]))
        self._num_taken = len(generated)
        if not matcher.is_error():
            self._bits = matcher.compute_bitmask()
        self._grammar.spend(time.thread_time_ns() - start_ns, matcher.get_error())


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits  # noqa: PLC0415

    return LLParserLimits(
        step_lexer_fuel=_MASK_FUEL, max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
    )


def _refused(grammar: Grammar, reason: str) -> ApiError:
    return invalid(f"'{grammar.param}' cannot be honoured: {_line(reason)}.", grammar.param)


def _line(reason: str) -> str:
    return " ".join(reason.replace("<non-verbose/>", "").split())[:_MAX_REASON_CHARS].rstrip(".")
