"""The released openai client against the gateway."""

import openai
import pytest
import trio

from pipeline.sampling.params import ChooserSpec
from tests.pipeline.gateway.http.openai_calls import MODEL, USER, fails, with_client


async def test_a_chat_is_answered_with_text_usage_and_reason(start_gateway):
    async with start_gateway() as gateway:
        answer = await with_client(
            gateway, lambda c: c.chat.completions.create(model=MODEL, messages=USER)
        )
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == "Hello, wörld!"
    assert choice.finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    prompt = "<|user|>Hi<|end|><|assistant|>"
    num_prompt = len(prompt) - len("<|end|>") + 1
    num_tokens = len("Hello, wörld!".encode()) + 1
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == num_tokens
    assert answer.usage.total_tokens == num_prompt + num_tokens


async def test_a_chat_streams_token_by_token_and_ends_with_its_usage(start_gateway, make_engine):
    def use(client):
        return list(
            client.chat.completions.create(
                model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
            )
        )

    async with start_gateway() as gateway:
        chunks = await with_client(gateway, use)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:-1]]
    # One chunk a character ("ö" is two tokens); the last has none.
    assert texts == [*"Hello, wörld!", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 14 + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 15
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_usage_says_what_of_the_prompts_was_computed_for_none_of_their_continuations(
    start_gateway, make_engine, is_streamed
):
    """Whole or streamed; what one continuation has from another is not counted."""
    more = {"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {}

    def use(client):
        answer = client.completions.create(model=MODEL, prompt=["abcd", "efgh"], n=2, **more)
        return list(answer)[-1].usage if is_streamed else answer.usage

    async with start_gateway(make_engine(cached=(2, 3, 0, 3))) as gateway:
        usage = await with_client(gateway, use)
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (8, 2)


async def test_only_texts_of_one_key_and_one_salt_go_on_from_each_other(start_gateway, make_engine):
    engine, keys = make_engine(), ("sk-one", "sk-two")

    def ask(key, **body):
        def use(client):
            client.completions.create(model=MODEL, prompt="Hi", **body)
            client.chat.completions.create(model=MODEL, messages=USER, **body)

        return lambda gateway: with_client(gateway, use, key)

    salted = {"extra_body": {"cache_salt": "s"}}
    async with start_gateway(engine, keys=keys) as gateway:
        for key in keys:
            for body in ({}, salted, salted | {"extra_body": {"cache_salt": "t"}}):
                await ask(key, **body)(gateway)
                await ask(key, **body)(gateway)
    salts = [each.salt for each in engine.generations]
    groups = [salts[i : i + 4] for i in range(0, len(salts), 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) == len(groups) == 6
    assert None not in salts


async def test_an_empty_salt_is_refused(start_gateway):
    async with start_gateway() as gateway:
        error = await fails(
            gateway, openai.BadRequestError,
            lambda c: c.completions.create(
                model=MODEL, prompt="Hi", extra_body={"cache_salt": ""}
            ),
        )  # fmt: skip
    assert error.param == "cache_salt"


async def test_tokens_arrive_while_later_ones_are_still_to_come(start_gateway, make_engine):
    release = trio.Event()
    engine = make_engine(text="abcdef")
    make = engine._make

    async def halting(generation, send):
        engine.seconds = 0
        ids = engine.tokenizer.encode("abc")
        await send.send(engine._output(generation, ids[0], None))
        await release.wait()
        await make(generation, send)

    engine._make = halting

    def use(client):
        stream = client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        chunks = iter(stream)
        next(chunks)
        first = next(chunks).choices[0].delta.content
        trio.from_thread.run_sync(release.set)
        rest = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return first, rest

    async with start_gateway(engine) as gateway:
        assert await with_client(gateway, use) == ("a", "abcdef")


async def test_a_completion_is_answered_and_streamed_alike(start_gateway):
    async with start_gateway() as gateway:
        whole = await with_client(
            gateway, lambda c: c.completions.create(model=MODEL, prompt="x", max_tokens=5)
        )
        chunks = await with_client(
            gateway,
            lambda c: list(
                c.completions.create(model=MODEL, prompt="x", max_tokens=5, stream=True)
            ),
        )
    assert whole.object == "text_completion"
    assert whole.choices[0].text == "Hello"
    assert whole.choices[0].finish_reason == "length"
    assert [chunk.choices[0].text for chunk in chunks] == list("Hello")
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_a_completion_generates_sixteen_tokens_unless_told(start_gateway, make_engine):
    async with start_gateway(make_engine(repeats=True)) as gateway:
        answer = await with_client(gateway, lambda c: c.completions.create(model=MODEL, prompt="x"))
    assert answer.usage.completion_tokens == 16


async def test_many_prompts_times_n_are_indexed_in_order(start_gateway):
    async with start_gateway() as gateway:
        answer = await with_client(
            gateway,
            lambda c: c.completions.create(
                model=MODEL, prompt=["one", "two"], n=2, max_tokens=3, echo=True
            ),
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["oneHel"] * 2 + ["twoHel"] * 2
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 12


async def test_prompts_may_be_token_ids(start_gateway, tokenizer):
    ids = list(tokenizer.encode("abc"))
    async with start_gateway() as gateway:
        await with_client(gateway, lambda c: c.completions.create(model=MODEL, prompt=ids))
        await with_client(gateway, lambda c: c.completions.create(model=MODEL, prompt=[ids, ids]))
        prompts = [generation.prompt_ids for generation in gateway.engine.generations]
    assert prompts == [tuple(ids)] * 3


async def test_n_streams_interleave_and_each_is_whole(start_gateway, make_engine):
    async with start_gateway(make_engine(seconds=0.001)) as gateway:
        chunks = await with_client(
            gateway,
            lambda c: list(c.chat.completions.create(model=MODEL, messages=USER, n=3, stream=True)),
        )
    texts = ["", "", ""]
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello, wörld!"] * 3
    assert sum(chunk.choices[0].finish_reason == "stop" for chunk in chunks) == 3


async def test_a_seed_repeats_the_tokens_and_differs_between_choices(start_gateway, make_engine):
    def create(client, seed):
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, n=2, seed=seed, max_tokens=20
        )
        return [choice.message.content for choice in answer.choices]

    async with start_gateway(make_engine(sampled=True)) as gateway:
        first = await with_client(gateway, lambda c: create(c, 5))
        again = await with_client(gateway, lambda c: create(c, 5))
        other = await with_client(gateway, lambda c: create(c, -9))
    assert first == again
    assert first[0] != first[1]
    assert first != other


async def test_chat_logprobs_carry_bytes_and_alternatives(start_gateway):
    async with start_gateway() as gateway:
        answer = await with_client(
            gateway,
            lambda c: c.chat.completions.create(
                model=MODEL, messages=USER, logprobs=True, top_logprobs=2
            ),
        )
    content = answer.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == "Hello, wörld!"
    assert all(token.logprob == -0.5 for token in content)
    assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
    assert content[0].token == "H"


async def test_streamed_logprobs_are_those_of_the_whole_answer(start_gateway):
    def create(client, **kwargs):
        return client.chat.completions.create(
            model=MODEL, messages=USER, logprobs=True, top_logprobs=1, stop=["rld"], **kwargs
        )

    async with start_gateway() as gateway:
        whole = await with_client(gateway, create)
        chunks = await with_client(gateway, lambda c: list(create(c, stream=True)))
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole.choices[0].logprobs.content
    assert bytes(byte for token in streamed for byte in token.bytes).decode() == "Hello, wö"


async def test_completion_logprobs_carry_offsets(start_gateway):
    async with start_gateway() as gateway:
        answer = await with_client(
            gateway,
            lambda c: c.completions.create(model=MODEL, prompt="x", logprobs=1, max_tokens=4),
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == list("Hell")
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs[0] == {"H": -0.5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [("wör", "Hello, "), (["zzz", "lo"], "Hel"), ("!", "Hello, wörld"), ("H", "")],
)
async def test_stop_strings_end_the_text_across_tokens(start_gateway, stop, expected, stream):
    def use(client):
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, stop=stop, stream=stream
        )
        if not stream:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].choices[0].finish_reason

    async with start_gateway() as gateway:
        assert await with_client(gateway, use) == (expected, "stop")
        assert gateway.engine.num_active == 0


async def test_a_stop_string_ends_the_generation_too(start_gateway, make_engine):
    async with start_gateway(make_engine(text="abc", repeats=True)) as gateway:
        await with_client(
            gateway,
            lambda c: c.chat.completions.create(model=MODEL, messages=USER, stop="ca"),
        )
        assert gateway.engine.num_made <= 5


async def test_sampling_parameters_reach_the_engine(start_gateway):
    async with start_gateway() as gateway:
        await with_client(
            gateway,
            lambda c: c.chat.completions.create(
                model=MODEL,
                messages=USER,
                temperature=0.3,
                top_p=0.9,
                presence_penalty=-1,
                frequency_penalty=1.5,
                logit_bias={"65": -100},
                seed=3,
                stop=["x"],
                max_completion_tokens=9,
                user="someone",
                extra_body={
                    "top_k": 7,
                    "min_p": 0.1,
                    "repetition_penalty": 1.2,
                    "min_tokens": 4,
                    "allowed_token_ids": [65, 66],
                    "chooser": {"name": "mirostat", "tau": 3},
                },
            ),
        )
        await with_client(gateway, lambda c: c.chat.completions.create(model=MODEL, messages=USER))
        told, default = gateway.engine.generations
    sampling = told.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.9, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.0, 1.5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert dict(sampling.logit_bias) == {65: -100.0}
    assert (sampling.seed, sampling.stop, told.max_tokens) == (3, ("x",), 9)
    assert (sampling.min_tokens, sampling.allowed_token_ids) == (4, (65, 66))
    assert sampling.chooser == ChooserSpec("mirostat", {"tau": 3})
    assert told.eos_token_ids == {256}
    # As OpenAI: sampled at temperature 1 unless told, up to the whole context.
    assert default.sampling.temperature == 1.0
    assert default.max_tokens == gateway.engine.max_seq_len


async def test_models_are_listed_and_retrieved(start_gateway):
    async with start_gateway() as gateway:
        listed = await with_client(gateway, lambda c: [model.id for model in c.models.list()])
        one = await with_client(gateway, lambda c: c.models.retrieve(MODEL))
        error = await fails(gateway, openai.NotFoundError, lambda c: c.models.retrieve("other"))
    assert listed == [MODEL]
    assert one.id == MODEL
    assert error.code == "model_not_found"


async def test_closing_a_stream_cancels_its_generation(start_gateway, make_engine):
    def use(client):
        stream = client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        for i, _ in enumerate(stream):
            if i == 5:
                break
        stream.close()

    async with start_gateway(make_engine(seconds=0.01, repeats=True)) as gateway:
        await with_client(gateway, use)
        with trio.fail_after(120):
            await gateway.engine.left.wait()
        assert gateway.engine.num_active == 0
        assert gateway.engine.num_made < 500
