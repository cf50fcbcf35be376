"""A stage's whole session, frame by frame, and what else pipeline/vectors.json has.

`python -m tests.pipeline.protocol.session_vector MODEL_DIR` prints a fresh recording: stage 1 of 2
of a tiny model, whose neighbours are played here.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import trio

from pipeline.agreement.manifest import load_manifest
from pipeline.codecs.registry import make_codec
from pipeline.protocol.batch import Segment
from pipeline.protocol.links import receive_step, send_step
from pipeline.protocol.messages import Done, Health, Shutdown, Start, encode_message
from pipeline.protocol.result_kinds import Want
from pipeline.protocol.step_header import PROTOCOL_VERSION, StepHeader, StepKind, encode_step
from pipeline.protocol.step_limits import CLEAR_SENTINEL
from tests.pipeline.stage.rig import LOOPBACK, Rig
from transport.dial_and_listen import listen
from transport.tensor_frames import DType, Tensor, TensorSpec

ROOT = Path(__file__).resolve().parents[3]
WIDTH = 24


def rows(num_tokens, width):
    """Element i of a row-major array is ((7 i) modulo 31 - 15) / 8; the sixth is 40 times that."""
    values = ((7 * np.arange(num_tokens * width)) % 31 - 15).astype(np.float32) / 8
    if values.size > 5:
        values[5] *= 40
    return values.reshape(num_tokens, width)


def tensor_of(values):
    return Tensor(TensorSpec(DType.F32, values.shape), memoryview(values.tobytes()))


def told(tensors):
    return [
        {"dtype": t.spec.dtype.name, "shape": list(t.spec.shape), "bytes": bytes(t.data).hex()}
        for t in tensors
    ]


def sent_rows(name):
    """Three rows as a codec sends them."""
    return told(make_codec(name, WIDTH).encode(rows(3, WIDTH)))


def manifest_hashes():
    """The core's hash of every example."""
    return {
        path.name: load_manifest(path).core_hash().hex()
        for path in sorted((ROOT / "manifests").glob("*.json"))
    }


async def session(model_dir, directory):
    """Every frame of a session with a real stage, in the order in which the other ends saw them."""
    rig, frames = Rig(model_dir, directory), []

    def note(message, *, to_stage):
        header = encode_message(message).hex()
        frames.append({"link": "control", "to_stage": to_stage, "header": header})

    async def tell(message):
        frames.append(
            {"link": "control", "to_stage": True, "header": encode_message(message).hex()}
        )
        await control.send(message)

    async def hear():
        message = await control.receive()
        frames.append(
            {"link": "control", "to_stage": False, "header": encode_message(message).hex()}
        )

    async def compute(header, *tensors):
        _tell(frames, "data_in", header, tensors)
        await send_step(upstream, header, tensors)
        header, tensors = await receive_step(downstream, gate)
        _tell(frames, "data_out", header, tensors)

    async with rig.worker():
        with listen(LOOPBACK) as results:
            control = await rig.control()
            await tell(rig.init(results.endpoint))
            upstream, downstream, gate = await rig.join(results)
            await hear()
            await tell(Start(request_id=1, slot=0))
            width = rig.limits.codec.hidden_dim
            for number, (position, count, want) in enumerate(
                [(0, 3, Want.NOTHING), (3, 2, Want.TOKEN), (5, 1, Want.TOKEN), (6, 1, Want.TOKEN)]
            ):
                step = StepHeader(StepKind.STEP, number, (Segment(0, position, count),), (want,))
                await compute(step, tensor_of(rows(count, width)))
            await tell(Health(sequence=1))
            await hear()
            await tell(Done(request_id=1))
            cleared = StepHeader(StepKind.TRUNCATE, 4, (Segment(0, 0, 0),), (Want.NOTHING,))
            await compute(cleared, CLEAR_SENTINEL)
            await tell(Shutdown())
            for channel in (upstream, downstream, control):
                await channel.aclose()
    return frames


def _tell(frames, link, header, tensors):
    frame = {"link": link, "to_stage": link == "data_in", "header": encode_step(header).hex()}
    frames.append(frame | {"tensors": told(tensors)})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        recorded = {
            "version": PROTOCOL_VERSION,
            "manifests": manifest_hashes(),
            "rows": [
                {"codec": name, "hidden": WIDTH, "tensors": sent_rows(name)}
                for name in ("F16", "BF16", "I8", "I5")
            ],
            "session": trio.run(session, Path(sys.argv[1]), Path(directory)),
        }
    print(json.dumps(recorded, indent=1))
