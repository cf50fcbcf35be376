"""Every field of a request and of an answer counts, and a refusal changes nothing."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.doors.bodies import Place
from pipeline.doors.messages import DoorFault
from pipeline.errors import MessageError
from tests.pipeline.doors.rig import begun, generate, model, reference, refused, wired

__all__ = ["model"]


def flipped(data):
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def moved(request, **place):
    old = Place(*np.frombuffer(request.nonce, ">u8,>u4,>u4")[0].tolist())
    return old._replace(**place).pack()


TAMPERED = {
    "cloaked_embedding": (lambda r: flipped(r.cloaked_embedding), DoorFault.UNAUTHENTIC),
    "grant": (lambda r: flipped(r.encrypted_session_key), DoorFault.UNAUTHENTIC),
    "key id": (lambda r: b"x" + r.encrypted_session_key[1:], DoorFault.WRONG_KEY),
    "position": (lambda r: moved(r, position=4), DoorFault.UNAUTHENTIC),
    "rows": (lambda r: moved(r, num_rows=1), DoorFault.UNAUTHENTIC),
    "a step of before": (lambda r: moved(r, step=0), DoorFault.CONFLICT),
    "a step to come": (lambda r: moved(r, step=2), DoorFault.UNKNOWN_SESSION),
    "no nonce": (lambda r: b"", DoorFault.INVALID),
    "shape": (lambda r: (1, 64), DoorFault.INVALID),
    "transposed": (lambda r: (64, 2), DoorFault.INVALID),
    "a batch": (lambda r: (1, 2, 64), DoorFault.INVALID),
    "no shape": (lambda r: (), DoorFault.INVALID),
    "negative": (lambda r: (-2, 64), DoorFault.INVALID),
    "fractions": (lambda r: (2.0, 64), DoorFault.INVALID),
    "truth": (lambda r: (True, 64), DoorFault.INVALID),
    "a huge shape": (lambda r: (1 << 62, 64), DoorFault.TOO_LARGE),
    "a long shape": (lambda r: (4097, 64), DoorFault.TOO_LARGE),
    "beyond the context": (lambda r: moved(r, position=127), DoorFault.TOO_LARGE),
    "dtype": (lambda r: "F16", DoorFault.INVALID),
    "no dtype": (lambda r: "", DoorFault.INVALID),
    "another session": (lambda r: "f" * 32, DoorFault.UNAUTHENTIC),
    "a path": (lambda r: "../../etc/passwd", DoorFault.INVALID),
    "a long name": (lambda r: "f" * 129, DoorFault.INVALID),
    "no name": (lambda r: "", DoorFault.INVALID),
    "max_new_tokens": (lambda r: 7, DoorFault.INVALID),
    "temperature": (lambda r: 0.7, DoorFault.INVALID),
    "no temperature": (lambda r: float("nan"), DoorFault.INVALID),
    "truncated": (lambda r: r.cloaked_embedding[:-1], DoorFault.INVALID),
    "too long": (lambda r: r.cloaked_embedding + bytes(1000), DoorFault.INVALID),
    "longer": (lambda r: r.cloaked_embedding + b"x", DoorFault.UNAUTHENTIC),
    "empty": (lambda r: b"", DoorFault.INVALID),
    "no grant": (lambda r: b"", DoorFault.INVALID),
}
FIELDS = {
    "grant": "encrypted_session_key", "key id": "encrypted_session_key",
    "no grant": "encrypted_session_key", "dtype": "dtype", "no dtype": "dtype",
    "another session": "session_id", "a path": "session_id", "a long name": "session_id",
    "no name": "session_id", "max_new_tokens": "max_new_tokens", "temperature": "temperature",
    "no temperature": "temperature", "cloaked_embedding": "cloaked_embedding",
    "truncated": "cloaked_embedding", "too long": "cloaked_embedding",
    "longer": "cloaked_embedding", "empty": "cloaked_embedding", "position": "nonce",
    "rows": "nonce", "a step of before": "nonce", "a step to come": "nonce", "no nonce": "nonce",
    "beyond the context": "nonce",
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
async def test_every_field_counts_and_a_refusal_changes_nothing(model, name):
    change, fault = TAMPERED[name]
    async with begun(model) as (door, session, _, _):
        request = session.seal(5, model.rows(2, seed=9), 2)
        await refused(door, replace(request, **{FIELDS.get(name, "shape"): change(request)}), fault)
        rows = session.open(await door.infer(request))
        expected = reference(model, (0, model.rows(5)), (5, model.rows(2, seed=9)))
        np.testing.assert_allclose(rows, expected[-2:], rtol=1e-4, atol=1e-5)


ANSWERS = {
    "output": lambda a: replace(a, output=flipped(a.output)),
    "nonce": lambda a: replace(a, output=b"x" + a.output[1:]),
    "cut": lambda a: replace(a, output=a.output[:-1]),
    "empty": lambda a: replace(a, output=b""),
    "shape": lambda a: replace(a, shape=(2, 64)),
    "huge": lambda a: replace(a, shape=(1 << 70, 64)),
    "dtype": lambda a: replace(a, dtype="F16"),
    "tokens": lambda a: replace(a, tokens_processed=6),
    "error": lambda a: replace(a, error="out of memory"),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_that_is_not_the_doors_own_is_refused(model, name):
    async with wired(model) as wire:
        wire.change_answer = ANSWERS[name]
        with pytest.raises(MessageError, match=r"the door|does not open"):
            await generate(model.pipeline(wire))
