"""Over real sockets both transports give the same bytes, and a text is what it always is."""

from contextlib import asynccontextmanager

import pytest

from pipeline.doors.dial import connect
from tests.pipeline.doors.rig import generate, model

__all__ = ["model"]


@asynccontextmanager
async def both(model, serve_door):
    async with model.door() as door, serve_door(door) as served:
        grpc = connect(f"grpc://127.0.0.1:{served.grpc}", is_dev=True)
        http = connect(f"http://127.0.0.1:{served.http}", is_dev=True)
        async with grpc as by_grpc, http as by_http:
            yield by_grpc, by_http


async def test_the_same_request_has_the_same_answer_through_both(model, serve_door):
    async with both(model, serve_door) as doors:
        session = await model.session(doors[0])
        for step in range(4):
            request = session.seal(step, model.rows(1), 1)
            one, two = [await door.infer(request) for door in doors]
            assert bytes(one.output) == bytes(two.output)
            assert (list(one.shape), one.dtype, one.tokens_processed) == (
                list(two.shape), two.dtype, two.tokens_processed,
            )  # fmt: skip
            session.open(two)
            doors = doors[::-1]


@pytest.mark.parametrize("which", [0, 1], ids=["grpc", "http"])
async def test_a_text_comes_through_a_socket(model, serve_door, which):
    async with model.door() as door:
        expected = await generate(model.pipeline(door))
    async with both(model, serve_door) as doors:
        assert await generate(model.pipeline(doors[which], max_body_bytes=5000)) == expected


async def test_a_worker_of_another_key_is_told_apart_over_both(model, serve_door):
    async with both(model, serve_door) as first, both(model, serve_door) as second:
        for one, other in zip(first, second, strict=True):
            pipeline = model.pipeline(one)
            begun = await generate(pipeline, num_tokens=4)
            pipeline._door = other
            assert (await generate(pipeline, num_tokens=4)) == begun
            assert pipeline.stats.num_handshakes == 2
