"""Takes orders: admits, encodes, limits and records them, and has them generated.

No door's protocol is known here: whoever stands before it calls `admit`, opens a `request`, has an
`Order` understood by `prepare` and follows `generate`. All of them raise ApiError, the last two
RequestTimedOut as well.
"""

import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import trio

from pipeline.engine.generation import Engine, Generation
from pipeline.engine.request_time import request_time
from pipeline.engine.stored_text import StoredText
from pipeline.errors import InputError, PromptError
from pipeline.gateway.answer_parts import THINK_END
from pipeline.gateway.auth import KeyRing, prefix_salt
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.continuations import PieceStream, TextOptions, open_choices
from pipeline.gateway.conversations import kept_to, rendered, text_options
from pipeline.gateway.errors import ApiError, busy, invalid, too_long, unknown_model
from pipeline.gateway.generation_order import Conversation, Order, TokenIds
from pipeline.gateway.grammars import GrammarCompiler
from pipeline.gateway.metrics import GatewayMetrics, RequestRecord
from pipeline.gateway.rate_limits import RateLimiter
from pipeline.gateway.settings import GatewayConfig
from pipeline.sampling.masks import NotThese

# Texts encoded at once. Conversations are rendered one after another, by one process.
_MAX_ENCODING = 4
# Of a text that is to be cut, so many contexts are encoded for the sake of its end.
_CUT_ROOMS = 8

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Job:
    """An order understood: what to generate, and of which prompts."""

    prompts: tuple[TokenIds, ...]
    generations: tuple[Generation, ...]
    options: TextOptions
    record: RequestRecord

    @property
    def num_prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def num_cached(self) -> int:
        """Those of them that no continuation of theirs had to have computed."""
        share = len(self.generations) // len(self.prompts)
        cached = [self.record.num_cached.get(each, 0) for each in range(len(self.generations))]
        return sum(min(cached[i : i + share]) for i in range(0, len(cached), share))


class Desk:
    """One model's, in front of one engine. Must be used under trio."""

    def __init__(
        self,
        config: GatewayConfig,
        engine: Engine,
        tokenizer: GatewayTokenizer,
        metrics: GatewayMetrics,
        sessions: Callable[[str, str], StoredText] | None = None,
    ) -> None:
        """`sessions`: the one that somebody calls by a name, where any are kept."""
        self._sessions = sessions
        self.config = config
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.keys = KeyRing(config.api_keys)
        self.created = int(time.time())
        self._engine = engine
        self._rate = RateLimiter(config.limits.requests_per_minute, trio.current_time)
        self._grammars = GrammarCompiler(tokenizer, config.eos_token_ids)
        self._encoding = trio.CapacityLimiter(_MAX_ENCODING)
        self._rendering = trio.CapacityLimiter(1)
        self._leaving = trio.Lock()
        self._num_choices = 0
        self._num_requests = 0
        self._is_idle = trio.Event()
        # Token ids of the model; 0 until its stages have said how many.
        self._vocab_size = 0
        self._is_open = trio.Event()
        # Why no order is taken now.
        self._refusal: Callable[[], ApiError] | None = None

    @property
    def max_seq_len(self) -> int:
        """Tokens a request may occupy, its prompt included."""
        return self._engine.max_seq_len

    def open(self, vocab_size: int) -> None:
        """Take orders from now on: the model, it has turned out, knows so many token ids."""
        self._vocab_size = vocab_size
        self._refusal = None
        self._is_open.set()

    def close(self, refusal: Callable[[], ApiError]) -> None:
        """Take none from now on, nor those that wait for the model: they hear why."""
        self._refusal = refusal
        self._is_open.set()

    async def _wait_open(self, record: RequestRecord) -> None:
        """Return when orders are taken. Raises ApiError while none are, RequestTimedOut."""
        with self.time_of(record):
            await self._is_open.wait()
        self._check_open()

    def time_of(self, record: RequestRecord) -> AbstractContextManager[object]:
        """Raises RequestTimedOut where the body takes longer than that request may, of all."""
        seconds = self.config.limits.request_seconds
        return nullcontext() if seconds is None else request_time(seconds, record.started)

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal()

    async def wait_idle(self) -> None:
        """Return when every request has been answered."""
        while self._num_requests:
            self._is_idle = trio.Event()
            await self._is_idle.wait()

    def admit(self, key: bytes | None) -> bytes:
        """Count a request of whoever has this key; who that is. Raises ApiError."""
        caller = self.keys.check(key)
        self.count_request()
        return caller

    def count_request(self) -> None:
        """Count a request of somebody whose key is known to be right. Raises ApiError."""
        self._rate.admit()

    @contextmanager
    def request(self, route: str) -> Iterator[RequestRecord]:
        """What is recorded of a request while it is answered; `route` is the door's name for it."""
        self._num_requests += 1
        try:
            yield RequestRecord(self.metrics, route)
        finally:
            self._num_requests -= 1
            self._is_idle.set()

    def check_model(self, model: str) -> None:
        """Raise ApiError unless it is the one that is served."""
        if model != self.config.served_model_name:
            raise unknown_model(model)

    async def prepare(
        self, order: Order, record: RequestRecord, caller: bytes | None = None
    ) -> Job:
        """Understand an order: check it, encode its prompts. Raises ApiError.

        `caller`: who asks, as `admit` says; the texts of one may go on from each other on the
        stages. None: from no other.
        """
        if order.model is not None:
            self.check_model(order.model)
        num_choices = max(1, len(order.prompts)) * len(order.sampling)
        if num_choices > self.config.limits.max_choices:
            limit = self.config.limits.max_choices
            raise invalid(f"At most {limit} continuations can be asked for at once.", "n")
        self._check_room(num_choices)
        max_tokens = self._max_tokens(order)
        # What the model can read is known when its stages stand; there is nobody to serve before.
        await self._wait_open(record)
        self._check_ids(order.stop_token_ids, "stop_token_ids")
        for sampling in order.sampling:
            self._check_ids(sampling.logit_bias, "logit_bias")
            self._check_ids(sampling.allowed_token_ids or (), "allowed_token_ids")
        wanted = kept_to(self.config, self.tokenizer, order)
        grammar = None
        if wanted is not None:
            grammar = await self._grammars.compile(wanted, self._vocab_size)
        prompts, is_thinking = await self._encode_all(order)
        thought_end = self.tokenizer.added_token(THINK_END) if is_thinking else None
        is_thinking = is_thinking and (grammar is None or thought_end is not None)
        try:
            stored = self._stored(order, num_choices, caller)
            salt = None if caller is None else prefix_salt(caller, order.cache_salt)
            generations = self._generations(order, prompts, max_tokens, record, salt, stored)
            # Attack: where no key is needed, whoever invents many would get many shares.
            client = caller if self.config.api_keys else None
            generations = tuple(replace(each, client=client) for each in generations)
            if grammar is not None:
                generations = tuple(
                    replace(each, masks=(*each.masks, grammar.new_mask(thought_end)))
                    for each in generations
                )
        except InputError as error:
            raise invalid(str(error), None) from error
        options = text_options(self.config, order, is_thinking=is_thinking)
        job = Job(prompts, generations, options, record)
        record.add_prompt(job.num_prompt)
        return job

    def _generations(
        self,
        order: Order,
        prompts: Sequence[TokenIds],
        max_tokens: int,
        record: RequestRecord,
        salt: bytes | None,
        stored: StoredText | None,
    ) -> tuple[Generation, ...]:
        sequences = [ids for word in order.bad_words for ids in self.tokenizer.spellings(word)]
        masks = (NotThese(sequences),) if sequences else ()
        ends = frozenset() if order.ignores_eos else self.config.eos_token_ids
        return tuple(
            Generation(
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                eos_token_ids=ends | order.stop_token_ids,
                sampling=sampling,
                request_id=record.request_id,
                vocab_size=self._vocab_size,
                salt=salt,
                stored=stored,
                samples_at_home=self.config.samples_at_home,
                masks=masks,
                reader=None if order.reader is None else order.reader(prompt_ids),
            )
            for prompt_ids in prompts
            for sampling in order.sampling
        )

    def _stored(self, order: Order, num_choices: int, caller: bytes | None) -> StoredText | None:
        """The caller's session that an order names. Raises ApiError, or InputError."""
        if order.session is None:
            return None
        if self._sessions is None:
            raise invalid("This server keeps no sessions (--secret-file).", "session")
        if num_choices != 1:
            raise invalid("A session goes on in one way: ask for one continuation.", "session")
        return self._sessions((caller or b"").hex(), order.session)

    @asynccontextmanager
    async def generate(self, job: Job) -> AsyncIterator[PieceStream]:
        """Generate all of a job's continuations; leaving aborts those under way.

        Raises ApiError if it cannot be begun, PipelineError as the engine does.
        """
        stored = job.generations[0].stored
        held = nullcontext() if stored is None else stored.held()
        with self.room(len(job.generations)):
            async with held, open_choices(
                self._engine,
                self.tokenizer,
                job.generations,
                job.options,
                job.record,
                self._leaving,
                partial(self.time_of, job.record),
            ) as pieces:  # fmt: skip
                yield pieces

    @contextmanager
    def room(self, num_choices: int) -> Iterator[None]:
        """So many continuations are under way meanwhile. Raises ApiError if they cannot be."""
        self._check_open()
        self._check_room(num_choices)
        self._num_choices += num_choices
        try:
            yield
        finally:
            self._num_choices -= num_choices

    async def encode_prompt(
        self, text: str, record: RequestRecord, *, is_message: bool = False
    ) -> TokenIds:
        """A prompt's tokens, or those of a conversation of one message; checked. Raises ApiError.

        Waits for the model to stand.
        """
        messages = [{"role": "user", "content": text}]
        order = Order(
            model=self.config.served_model_name,
            sampling=(),
            conversation=Conversation(messages) if is_message else None,
            prompts=() if is_message else (text,),
        )
        return await self.encode(order, record)

    async def encode(self, order: Order, record: RequestRecord) -> TokenIds:
        """The tokens of an order's one prompt; checked. Raises ApiError. Waits for the model."""
        if order.model is not None:
            self.check_model(order.model)
        await self._wait_open(record)
        ((prompt_ids,), _) = await self._encode_all(order)
        return prompt_ids

    async def decode(
        self, model: str | None, token_ids: Sequence[int], record: RequestRecord
    ) -> str:
        """The text of tokens, special ones included. Raises ApiError. Waits for the model."""
        if model is not None:
            self.check_model(model)
        await self._wait_open(record)
        self._check_ids(token_ids, "tokens")
        whole = partial(self.tokenizer.decode_whole, token_ids)
        return await self._in_thread(whole, self._encoding, "tokens")

    def _check_room(self, num_choices: int) -> None:
        """Attack: asking for more than anybody will ever wait for, to fill the queue for all."""
        limit = self.config.limits.max_open_choices
        if self._num_choices + num_choices > limit:
            raise busy(f"{self._num_choices} of at most {limit} continuations are open; try again.")

    def _max_tokens(self, order: Order) -> int:
        asked, room = order.max_tokens, self.max_seq_len
        if asked is not None and asked > room:
            param = order.max_tokens_param
            raise invalid(f"{param} is {asked}; this model's context holds {room} tokens.", param)
        return (self.config.default_max_tokens or room) if asked is None else asked

    async def _encode_all(self, order: Order) -> tuple[tuple[TokenIds, ...], bool]:
        """The prompts, and whether the model has begun to think at their end. Raises ApiError."""
        if order.conversation is not None:
            adds = bool(order.adds_special_tokens)
            render = partial(rendered, self.config, order.conversation)
            param = order.conversation.param
            text, is_thinking = await self._in_thread(render, self._rendering, param)
            return (await self._encode(text, adds, order, param),), is_thinking
        adds = order.adds_special_tokens is not False
        prompts = tuple(
            [
                await self._encode(prompt, adds, order, order.prompts_param)
                if isinstance(prompt, str)
                else self._checked(prompt, order, order.prompts_param)
                for prompt in order.prompts
            ]
        )
        return prompts, False

    async def _encode(self, text: str, adds_special: bool, order: Order, param: str) -> TokenIds:
        if order.only_encodes and not text:
            return ()
        self._check_length(text, order, param)
        encoder = self.tokenizer.encode if adds_special else self.tokenizer.encode_rendered
        prompt_ids = await self._in_thread(partial(encoder, text), self._encoding, param)
        return self._checked(prompt_ids, order, param)

    @staticmethod
    async def _in_thread(
        work: Callable[[], _Result], limiter: trio.CapacityLimiter, param: str
    ) -> _Result:
        """Work in a thread: a long text takes a second, and others' tokens must not wait."""
        try:
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        except PromptError as error:
            raise invalid(str(error), param) from error

    def _check_length(self, text: str, order: Order, param: str) -> None:
        """Refuse what is too long however it is split: no token has more than so many characters.

        Attack: a text of megabytes, which takes seconds to split.
        """
        room = self.max_seq_len
        num_tokens = len(text) // self.tokenizer.max_token_chars
        is_cut = order.truncates_to is not None or order.only_encodes
        if num_tokens >= (_CUT_ROOMS * room if is_cut else room):
            raise too_long(f"at least {num_tokens}", room, param)

    def _checked(self, prompt_ids: TokenIds, order: Order, param: str) -> TokenIds:
        room = self.max_seq_len
        if order.truncates_to is not None:
            most = room - 1 if order.truncates_to < 0 else order.truncates_to
            prompt_ids = prompt_ids[-most:]
        if order.only_encodes:
            return prompt_ids
        if not prompt_ids:
            raise invalid("The prompt is empty; give at least one token of text.", param)
        if len(prompt_ids) >= room:
            raise too_long(str(len(prompt_ids)), room, param)
        self._check_ids(prompt_ids, param)
        return prompt_ids

    def _check_ids(self, token_ids: Collection[int], param: str) -> None:
        """Refuse tokens the model has no row for.

        Attack: only a stage would notice, and break; each loss of one costs everybody.
        """
        largest = max(token_ids, default=-1)
        if 0 < self._vocab_size <= largest:
            raise invalid(
                f"The model has no token {largest}; its last is {self._vocab_size - 1}.", param
            )
