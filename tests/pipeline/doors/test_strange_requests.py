"""Whatever a request says, it is refused in one line, and the session beside it lives."""

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.doors.bodies import Place
from pipeline.doors.messages import DoorError, DoorFault, InferRequest
from tests.pipeline.doors.rig import model

__all__ = ["model"]

BYTES = st.one_of(st.binary(max_size=300), st.binary(max_size=40).map(memoryview))
INTS = st.one_of(st.integers(-3, 5000), st.integers(-(1 << 63), (1 << 63) - 1))
NONCES = st.one_of(
    BYTES,
    st.builds(
        lambda *parts: Place(*parts).pack(),
        st.integers(0, 3), st.integers(0, 200), st.integers(0, 200),
    ),
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=200), st.sampled_from(["F32", "chat", "../../x", "a\0b"]))
SHAPES = st.one_of(
    st.lists(INTS, max_size=5),
    st.builds(lambda n: [n, 64], INTS),
    st.just([1, 64]),
    st.just([0, 64]),
)
REQUESTS = st.builds(
    InferRequest,
    cloaked_embedding=st.one_of(BYTES, st.binary(min_size=272, max_size=272)),
    encrypted_session_key=st.one_of(BYTES, st.binary(min_size=120, max_size=120)),
    nonce=NONCES,
    shape=SHAPES,
    dtype=st.one_of(TEXTS, st.just("F32")),
    session_id=st.one_of(TEXTS, st.just("chat")),
    max_new_tokens=st.one_of(INTS, st.just(0)),
    temperature=st.one_of(st.floats(width=32), st.just(0.0)),
)


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(REQUESTS, st.booleans(), st.booleans()), min_size=5, max_size=20))
def test_strange_requests_are_refused_in_one_line(model, strange):
    async def main():
        async with model.door() as door:
            session = await model.session(door)
            first = session.seal(0, model.rows(1), 1)
            session.open(await door.infer(first))
            for request, has_grant, has_name in strange:
                parts = {}
                if has_grant:  # so that more than the grant is looked at
                    parts["encrypted_session_key"] = first.encrypted_session_key
                if has_name:
                    parts["session_id"] = first.session_id
                fields = {name: getattr(request, name) for name in request.__slots__}
                with pytest.raises(DoorError) as caught:
                    await door.infer(InferRequest(**(fields | parts)))
                error = caught.value
                assert "\n" not in str(error)
                assert len(str(error)) < 300
                assert (error.fault is DoorFault.WRONG_KEY) is (error.key is not None)
            session.open(await door.infer(session.seal(1, model.rows(1), 1)))

    trio.run(main)
