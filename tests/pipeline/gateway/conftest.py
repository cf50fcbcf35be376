"""A gateway on loopback before an engine that makes tokens up."""

import gc
import logging
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import trio
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from pipeline.engine.generation import TokenOutput
from pipeline.engine.request import FinishReason
from pipeline.errors import PromptError
from pipeline.gateway.chat_tokenizer import GatewayTokenizer
from pipeline.gateway.desk import Desk
from pipeline.gateway.http.server import serve
from pipeline.gateway.http.stego import stego_routes
from pipeline.gateway.metrics import GatewayMetrics
from pipeline.gateway.rate_limits import GatewayLimits
from pipeline.gateway.readiness import READY
from pipeline.gateway.sampling_defaults import OPENAI
from pipeline.gateway.settings import GatewayConfig
from pipeline.gateway.templates import ChatTemplate
from pipeline.gateway.tool_families import family_of
from pipeline.sampling.sampler import Sampler

KEY = "sk-test-0123456789"
MODEL = "tiny/model"
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """One token a byte, and the special token that ends a text (id 256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(END, special=True)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(path))
    return GatewayTokenizer(path)


@dataclass
class FakeEngine:
    """Says `text` byte by byte, `seconds` apart, again and again if `repeats`, then ends.

    `sampled`: draws letters from logits of its own instead, with the request's sampler.
    """

    tokenizer: GatewayTokenizer
    text: str = "Hello, wörld!"
    seconds: float = 0.0
    repeats: bool = False
    sampled: bool = False
    max_seq_len: int = 4096
    fail_at: int | None = None
    error: Exception | None = None
    generations: list = field(default_factory=list)
    # Tokens of each prompt that are said to have been there, by the continuation's number.
    cached: tuple[int, ...] = ()
    num_active: int = 0
    num_made: int = 0
    left: trio.Event = field(default_factory=trio.Event)

    @asynccontextmanager
    async def generate(self, generation):
        if len(generation.prompt_ids) >= self.max_seq_len:
            raise PromptError("too long")
        self.generations.append(generation)
        self.num_active += 1
        send, receive = trio.open_memory_channel(0)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._make, generation, send)
                yield _Failing(receive, self)
                nursery.cancel_scope.cancel()
        finally:
            receive.close()
            self.num_active -= 1
            self.left.set()

    async def _make(self, generation, send):
        ids = self.tokenizer.encode(self.text)
        room = self.max_seq_len - len(generation.prompt_ids)
        sampler = Sampler(generation.sampling, generation.prompt_ids)
        rng = np.random.default_rng(0)
        async with send:
            for i in range(min(generation.max_tokens, room)):
                if i == self.fail_at:
                    return
                is_last = i + 1 >= min(generation.max_tokens, room)
                finish = FinishReason.LENGTH if is_last else None
                if self.sampled:
                    logits = rng.normal(size=256).astype(np.float32)
                    logits[:33] = logits[94:] = -np.inf
                    choice = sampler.choose(logits)
                    output = TokenOutput(choice.token_id, choice.logprob, choice.top, finish)
                elif i >= len(ids) and not self.repeats:
                    output = self._output(generation, 256, FinishReason.EOS)
                else:
                    output = self._output(generation, ids[i % len(ids)], finish)
                self.num_made += 1
                await send.send(output)
                if output.finish:
                    return
                await trio.sleep(self.seconds)

    def _output(self, generation, token_id, finish):
        num = generation.sampling.logprobs
        at = next(i for i, each in enumerate(self.generations) if each is generation)
        cached = self.cached[at] if at < len(self.cached) else 0
        if num is None:
            return TokenOutput(token_id, None, (), finish, num_cached=cached)
        top = tuple(((token_id + i) % 256, -0.5 - i) for i in range(num))
        return TokenOutput(token_id, -0.5, top, finish, num_cached=cached)


class _Failing:
    """The engine's channel: its end before the last token is the engine's failure."""

    def __init__(self, channel, engine):
        self._channel = channel
        self._engine = engine

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return await self._channel.receive()
        except trio.EndOfChannel:
            if self._engine.error is not None:
                raise self._engine.error from None
            raise StopAsyncIteration from None


@dataclass
class Running:
    url: str
    engine: FakeEngine
    registry: CollectorRegistry
    desk: Desk

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    def metric(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def make_engine(tokenizer):
    return lambda **kwargs: FakeEngine(tokenizer, **kwargs)


@pytest.fixture(scope="session")
def template():
    return ChatTemplate.compile(TEMPLATE, {"eos_token": END})


@pytest.fixture
def make_desk(tokenizer, template):
    """A desk that knows its model, before `engine`; its metrics are in `registry`."""

    def make(
        engine=None,
        *,
        keys=(KEY,),
        registry=None,
        tls=None,
        sessions=None,
        chat=template,
        cors=(),
        defaults=OPENAI,
        **limits,
    ):
        config = GatewayConfig(
            served_model_name=MODEL,
            chat_template=chat,
            tool_family=family_of(chat.source),
            cors_origins=cors,
            sampling_defaults=defaults,
            eos_token_ids=frozenset({256}),
            port=0,
            api_keys=frozenset(keys),
            tls=tls,
            limits=GatewayLimits(**limits),
        )
        metrics = GatewayMetrics(registry or CollectorRegistry())
        desk = Desk(config, engine or FakeEngine(tokenizer), tokenizer, metrics, sessions)
        desk.open(tokenizer.vocab_size)
        return desk

    return make


@pytest.fixture
def start_gateway(make_desk, tokenizer):
    """A context manager: a gateway with these limits and keys before `engine`."""

    @asynccontextmanager
    async def start(
        engine=None, *, readiness=lambda: READY, overview=None, stego=None, page=(), **options
    ):
        logging.getLogger("pipeline.gateway").setLevel(logging.INFO)
        engine = engine or FakeEngine(tokenizer)
        registry = CollectorRegistry()
        desk = make_desk(engine, registry=registry, **options)

        more = stego_routes(desk, stego) if stego else ()

        async def run(task_status):
            await serve(
                desk, registry, readiness=readiness, overview=overview, more=more,
                page=page, task_status=task_status,
            )  # fmt: skip

        async with trio.open_nursery() as nursery:
            url = await nursery.start(lambda task_status: run(task_status))
            yield Running(url, engine, registry, desk)
            nursery.cancel_scope.cancel()

    return start


class RawClient:
    """Bytes to and from the gateway."""

    def __init__(self, stream):
        self.stream = stream

    async def post(self, path, body, *, key=KEY, headers=b"", length=None):
        length = len(body) if length is None else length
        auth = f"authorization: Bearer {key}\r\n".encode() if key else b""
        await self.stream.send_all(
            b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n%s%s\r\n%s"
            % (path.encode(), length, auth, headers, body)
        )

    async def read_response(self):
        """(status, headers, body) of a response with a content-length."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += await self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        while len(body) < int(headers.get(b"content-length", 0)):
            body += await self._more()
        return int(lines[0].split()[1]), headers, body

    async def read_until(self, mark):
        data = b""
        while mark not in data:
            data += await self._more()
        return data

    async def wait_closed(self):
        """Read until the server has closed the connection; what it still sent."""
        data = b""
        try:
            while more := await self.stream.receive_some(65536):
                data += more
        except trio.BrokenResourceError:
            pass
        return data

    async def _more(self):
        data = await self.stream.receive_some(65536)
        if not data:
            raise EOFError
        return data


@pytest.fixture
def connect():
    """A context manager: a raw connection to a running gateway."""

    @asynccontextmanager
    async def connect(gateway, **options):
        stream = await trio.open_tcp_stream("127.0.0.1", gateway.port)
        for (level, name), value in options.get("sockopts", {}).items():
            stream.setsockopt(level, name, value)
        async with stream:
            yield RawClient(stream)

    return connect


# What costs a hundredth of it at most: a machine may be slow.
LONGEST_GAP_SECONDS = 0.5


@pytest.fixture
def heartbeat():
    """A context manager: how long the event loop was ever busy without a pause, in seconds.

    Of this thread's processor time: what others do with the machine makes no difference so.
    """

    @asynccontextmanager
    async def heartbeat():
        gaps = []

        async def beat():
            last = time.thread_time()
            while True:
                await trio.lowlevel.checkpoint()
                now = time.thread_time()
                gaps.append(now - last)
                last = now

        # What the whole test run has left in memory is not to be gone through meanwhile.
        gc.collect()
        gc.freeze()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            while not gaps:
                await trio.lowlevel.checkpoint()
            gaps.clear()
            yield gaps
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    return heartbeat
