"""The desk, through a door of its own: plain Python calls."""

import logging
import sys
from dataclasses import replace
from subprocess import run

import pytest
import trio
import trio.lowlevel
import trio.testing
from prometheus_client import CollectorRegistry

from pipeline.engine.engine import PipelineEngine
from pipeline.engine.limits import Limits
from pipeline.errors import RequestTimedOut
from pipeline.gateway.desk import Desk
from pipeline.gateway.errors import ApiError, Kind, leaving
from pipeline.gateway.generation_order import Conversation, Order
from pipeline.protocol.result_kinds import Want
from pipeline.sampling.params import SamplingParams
from tests.pipeline.gateway.conftest import LONGEST_GAP_SECONDS

KEY = b"sk-test-0123456789"
GREEDY = SamplingParams()


class PlainDoor:
    """Another way in: a call that returns texts."""

    def __init__(self, desk):
        self.desk = desk

    async def ask(self, *, key=KEY, **fields):
        self.desk.admit(key)
        order = Order(**({"model": "tiny/model", "sampling": (GREEDY,)} | fields))
        with self.desk.request("plain") as record:
            job = await self.desk.prepare(order, record)
            texts = [""] * len(job.generations)
            async with self.desk.generate(job) as pieces:
                async for piece in pieces:
                    texts[piece.choice] += piece.text
            record.status = "ok"
            record.log(logging.INFO)
        return texts

    async def refusal(self, **fields):
        with pytest.raises(ApiError) as caught:
            await self.ask(**fields)
        return caught.value


@pytest.fixture
def make_door(make_desk):
    return lambda *args, **kwargs: PlainDoor(make_desk(*args, **kwargs))


def test_the_desk_brings_no_http_along():
    code = "import sys, pipeline.gateway.desk; print(*sys.modules)"
    loaded = run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    roots = {name.partition(".")[0] for name in loaded.split()}
    assert "pipeline.gateway.desk" in loaded.split()
    assert not roots & {"starlette", "hypercorn", "h11"}
    assert "pipeline.gateway.http" not in loaded.split()


async def test_another_door_generates_with_keys_limits_and_metrics(make_door, make_engine, caplog):
    caplog.set_level(logging.INFO)
    registry = CollectorRegistry()
    door = make_door(make_engine(), registry=registry, requests_per_minute=3)
    assert await door.ask(prompts=("Hi",)) == ["Hello, wörld!"]
    talk = Conversation([{"role": "user", "content": "Hi"}])
    assert await door.ask(conversation=talk, sampling=(GREEDY,) * 2) == ["Hello, wörld!"] * 2
    error = await door.refusal(prompts=("Hi",), key=b"sk-wrong")
    assert error.kind is Kind.NO_KEY
    await door.ask(prompts=("Hi",))
    error = await door.refusal(prompts=("Hi",))
    assert (error.kind, error.retry_seconds) == (Kind.TOO_MANY, 20)
    assert registry.get_sample_value("veilpipe_generated_tokens_total") == 15 * 4
    assert registry.get_sample_value("veilpipe_ttft_seconds_count") == 3
    lines = [each.getMessage() for each in caplog.records if "event=request" in each.getMessage()]
    assert len(lines) == 3
    assert all("route=plain status=ok" in line for line in lines)


async def test_another_model_is_not_here(make_door):
    error = await make_door().refusal(model="other", prompts=("Hi",))
    assert (error.kind, error.param) == (Kind.NOT_FOUND, "model")


@pytest.mark.parametrize("prompt", [(257,), (1, 2**31 - 1), (0,) * 50 + (257,)], ids=range(3))
async def test_ids_beyond_the_model_are_refused_before_the_engine(make_door, make_engine, prompt):
    engine = make_engine()
    door = make_door(engine)
    error = await door.refusal(prompts=((1, 2), prompt))
    assert (error.kind, error.param) == (Kind.INVALID, "prompt")
    assert not engine.generations


async def test_a_text_that_spells_an_id_beyond_the_model_is_refused_too(make_door, make_engine):
    engine = make_engine()
    door = make_door(engine)
    door.desk.open(256)  # a model without a row for the tokenizer's <|end|>
    talk = Conversation([{"role": "user", "content": "Hi"}])
    assert (await door.refusal(prompts=("a<|end|>",))).param == "prompt"
    assert (await door.refusal(conversation=talk)).param == "messages"
    biased = SamplingParams(logit_bias={256: 1.0})
    assert (await door.refusal(prompts=("a",), sampling=(biased,))).param == "logit_bias"
    error = await door.refusal(prompts=("a",), stop_token_ids=frozenset({256}))
    assert error.param == "stop_token_ids"
    assert not engine.generations
    assert await door.ask(prompts=("a",)) == ["Hello, wörld!"]


async def test_until_the_model_is_known_orders_wait(make_desk, make_engine):
    desk = make_desk(make_engine())
    desk._is_open = trio.Event()
    desk._vocab_size = 0
    door = PlainDoor(desk)
    errors = []

    async def ask():
        errors.append(await door.refusal(prompts=((300,),)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert not errors
        desk.open(300)
    assert errors[0].param == "prompt"


async def test_while_a_desk_is_closed_those_who_wait_and_those_who_come_hear_why(make_desk):
    desk = make_desk(PipelineEngine(Limits(4, 64)))
    desk._is_open = trio.Event()
    failures = []

    async def ask():
        try:
            await PlainDoor(desk).ask(prompts=("a",))
        except ApiError as error:
            failures.append(error.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        desk.close(leaving)
        with trio.fail_after(30):
            await desk.wait_idle()
    await ask()
    assert failures == ["server_stopping"] * 2


async def until_open(door, num_choices):
    """Their prompts are encoded in other threads first."""
    with trio.fail_after(60):
        while door.desk._num_choices < num_choices:  # noqa: ASYNC110
            await trio.sleep(0.001)


async def test_continuations_are_counted_not_requests(make_door, make_engine):
    door = make_door(make_engine(seconds=60), max_open_choices=8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: door.ask(prompts=("a",), sampling=(GREEDY,) * 5))
        await until_open(door, 5)
        error = await door.refusal(prompts=("a", "b"), sampling=(GREEDY,) * 2)
        assert (error.kind, error.code, error.retry_seconds) == (Kind.BUSY, "server_busy", 1)
        nursery.start_soon(lambda: door.ask(prompts=("a",), sampling=(GREEDY,) * 3))
        await until_open(door, 8)
        assert (await door.refusal(prompts=("a",))).kind is Kind.BUSY
        nursery.cancel_scope.cancel()
    door.desk._engine.seconds = 0.0
    assert await door.ask(prompts=("a",), sampling=(GREEDY,) * 8) == ["Hello, wörld!"] * 8


@pytest.mark.parametrize("num_each", [20, pytest.param(100, marks=pytest.mark.slow)])
async def test_five_thousand_that_hang_up_at_once_hold_nobody_up(make_desk, heartbeat, num_each):
    engine = PipelineEngine(Limits(16, 64))
    door = PlainDoor(make_desk(engine, max_open_choices=5000))
    scopes = []

    async def client():
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await door.ask(prompts=("a",), sampling=(GREEDY,) * num_each)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(5000 // num_each):
                nursery.start_soon(client)
            while engine.scheduler.num_waiting < 5000:  # noqa: ASYNC110
                await trio.sleep(0.01)
            async with heartbeat() as gaps:
                for scope in scopes:
                    scope.cancel()
                while engine.scheduler.num_waiting:
                    await trio.lowlevel.checkpoint()
    assert not engine.scheduler.has_work
    assert max(gaps) < LONGEST_GAP_SECONDS


async def test_an_endless_prompt_is_refused_by_its_length(make_door, make_engine, monkeypatch):
    door = make_door(make_engine(max_seq_len=100))
    monkeypatch.setattr(door.desk.tokenizer, "encode", lambda _: pytest.fail("was encoded"))
    longest = door.desk.tokenizer.max_token_chars
    error = await door.refusal(prompts=("x" * 100 * longest,))
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    assert "at least 100" in error.message


async def test_encoding_holds_up_nobody(make_door, make_engine, heartbeat):
    door = make_door(make_engine(max_seq_len=1 << 20))
    async with heartbeat() as gaps:
        await door.ask(prompts=("word " * 100_000,))
    # By their number: whoever holds this interpreter's lock takes none of this thread's time.
    assert len(gaps) > 1000


async def test_a_prompt_may_be_cut_to_its_end(make_door, make_engine):
    engine = make_engine(max_seq_len=20)
    door = make_door(engine)
    await door.ask(prompts=("abcdef", (1, 2, 3, 4)), truncates_to=3)
    assert [each.prompt_ids for each in engine.generations] == [
        door.desk.tokenizer.encode("def"),
        (2, 3, 4),
    ]
    engine.generations.clear()
    await door.ask(prompts=("x" * 50,), truncates_to=-1)
    assert len(engine.generations[0].prompt_ids) == 19
    assert (await door.refusal(prompts=("x" * 50,), truncates_to=30)).param == "prompt"
    # It takes seconds and gigabytes to split what is far too long, and nobody reads it.
    assert (await door.refusal(prompts=("x" * 10_000,), truncates_to=3)).param == "prompt"


async def test_tokens_may_end_a_text(make_door, make_engine):
    engine = make_engine()
    await make_door(engine).ask(prompts=("a",), stop_token_ids=frozenset({7}))
    await make_door(engine).ask(prompts=("a",), stop_token_ids=frozenset({7}), ignores_eos=True)
    assert [each.eos_token_ids for each in engine.generations] == [{7, 256}, {7}]


async def test_what_ended_a_text_may_be_part_of_it(make_door, make_engine):
    stops = SamplingParams(stop=("lo, w", "zz", "o, wö"))
    door = make_door(make_engine())
    assert await door.ask(prompts=("a",), sampling=(stops,)) == ["Hel"]
    assert await door.ask(prompts=("a",), sampling=(stops,), includes_stop=True) == ["Hello, w"]
    shown = {"shows_special_tokens": True}
    assert await door.ask(prompts=("a",), **shown) == ["Hello, wörld!"]
    assert await door.ask(prompts=("a",), includes_stop=True, **shown) == ["Hello, wörld!<|end|>"]


async def test_special_tokens_are_shown_where_asked_for(make_door, make_engine):
    door = make_door(make_engine(text="a<|end|>b"))
    assert await door.ask(prompts=("a",)) == ["ab"]
    assert await door.ask(prompts=("a",), shows_special_tokens=True) == ["a<|end|>b"]


async def test_a_conversation_may_go_on_with_its_last_message(make_door, make_engine):
    engine = make_engine()
    door = make_door(engine)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I think "}]
    await door.ask(conversation=Conversation(messages, continues_last=True))
    await door.ask(conversation=Conversation(messages, adds_turn=False))
    encode = door.desk.tokenizer.encode_rendered
    shown = "<|user|>Hi<|end|><|assistant|>I think "
    assert [each.prompt_ids for each in engine.generations] == [
        encode(shown),
        encode(shown + "<|end|>"),
    ]


async def test_variables_the_template_does_not_read_are_refused_by_name(make_door):
    talk = Conversation([{"role": "user", "content": "Hi"}], variables={"enable_thinking": True})
    error = await make_door().refusal(conversation=talk)
    assert (error.code, error.param) == (
        "unsupported_parameter",
        "chat_template_kwargs.enable_thinking",
    )


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (SamplingParams(min_tokens=5), None),
        (SamplingParams(allowed_token_ids=(5, 257)), "allowed_token_ids"),
    ],
    ids=["too few tokens", "unknown token"],
)
async def test_what_sampling_cannot_have_is_refused(make_door, make_engine, sampling, param):
    engine = make_engine()
    error = await make_door(engine).refusal(prompts=("a",), max_tokens=3, sampling=(sampling,))
    assert (error.kind, error.param) == (Kind.INVALID, param)
    assert not engine.generations


@pytest.mark.parametrize("at_home", [False, True])
async def test_who_draws_is_for_whoever_starts_it_to_say(make_door, make_engine, at_home):
    engine = make_engine()
    door = make_door(engine)
    door.desk.config = replace(door.desk.config, samples_at_home=at_home)
    drawn = SamplingParams(temperature=1.0)
    await door.ask(prompts=("a",), sampling=(GREEDY, drawn))
    wants = {generation.want for generation in engine.generations}
    assert wants == ({Want.LOGITS} if at_home else {Want.TOKEN, Want.DRAWN})


async def test_a_requests_time_is_counted_from_its_arrival_and_over_for_it_alone(
    make_door, make_engine, autojump_clock
):
    engine = make_engine(seconds=4)
    door = make_door(engine, request_seconds=10)
    began = trio.current_time()
    with pytest.raises(RequestTimedOut, match="10 s"):
        await door.ask(prompts=("x",))
    assert trio.current_time() == began + 10
    assert engine.num_active == 0
    engine.seconds = 0.5
    assert await door.ask(prompts=("x",)) == ["Hello, wörld!"]


async def test_a_requests_time_runs_while_no_stage_can_serve_it(
    make_desk, make_engine, tokenizer, autojump_clock
):
    ready = make_desk(request_seconds=10)
    desk = Desk(ready.config, make_engine(), tokenizer, ready.metrics)
    began = trio.current_time()
    with pytest.raises(RequestTimedOut):
        await PlainDoor(desk).ask(prompts=("x",))
    assert trio.current_time() == began + 10
