"""What passes a door tells a host sizes and places, and no key, token or activation."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256

from pipeline.doors.bodies import Frame, Place
from pipeline.doors.grants import Grant
from tests.pipeline.doors.rig import PROMPT, Wire, generate, model

__all__ = ["model"]


def windows(data, size=12):
    """Parts of `data` that a recording would hold if any of it travelled in the clear."""
    step = max(1, (len(data) - size) // 64)
    return [data[at : at + size] for at in range(0, len(data) - size + 1, step)]


async def test_a_recording_holds_no_key_token_or_activation(model):
    opened = []

    async with model.door() as door:
        wire = Wire(door)
        pipeline = model.pipeline(wire)
        tokens = await generate(pipeline, num_tokens=20)
        open_one = door._sessions.find
        session = open_one(wire.requests[0].session_id)
        for request in wire.requests:
            place = Place(*np.frombuffer(request.nonce, ">u8,>u4,>u4")[0].tolist())
            frame = (request.session_id, request.dtype, request.shape)
            opened.append(
                session.bodies.open_request(Frame(*frame), place, request.cloaked_embedding)
            )
    seen = wire.recording()
    assert len(seen) > 57 * 64 * 4
    assert sum(map(len, opened)) == (57 + 19) * 64 * 4
    secrets = [session.grant.session_key, session.grant.owner, b"chat", *opened]
    for ids in (PROMPT, tokens):
        secrets += [np.array(ids, kind).tobytes() for kind in ("<u4", "<i8", ">u4")]
        secrets.append(repr(tuple(ids))[1:-1].encode())
    for secret in secrets:
        assert not any(window in seen for window in windows(secret, min(12, len(secret))))
    assert all(window in b"-" + opened[0] for window in windows(opened[0]))


async def test_an_older_clients_session_is_sealed_to_the_key_it_was_given(model):
    older_key = rsa.generate_private_key(65537, 2048)
    oaep = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)
    async with model.door(older_key=older_key) as door:
        session = await model.session(door)
        session._grant = Grant.parse(session._grant.session_key)
        session._seal_grant = lambda: older_key.public_key().encrypt(
            session._grant.session_key, oaep
        )
        session._sealed_grant = session._seal_grant()
        for at in (0, 3):
            rows = session.open(await door.infer(session.seal(at, model.rows(3), 1)))
            assert np.isfinite(rows).all()
