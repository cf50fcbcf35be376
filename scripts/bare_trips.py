"""How long a round trip takes between a stage and its attention worker where nothing is computed.

Two processes, the same channel and the same bytes as a token's question of one layer: what a mode
with so many questions cannot be faster than, over the computation.
"""

import multiprocessing
import os
import statistics
from time import perf_counter

import numpy as np
import trio

from pipeline.agreement.manifest import Manifest, dump_manifest, parse_manifest
from pipeline.agreement.trust_policy import DevTrust
from pipeline.dtypes import FLOAT32
from pipeline.models.model_config import ModelConfig
from pipeline.remote_parts.parts import PartAccess, RemoteParts, part_link
from pipeline.remote_parts.serving import PartServer
from pipeline.remote_parts.wire import Message, to_tensor
from pipeline.scx.attention_wire import ANSWER_LIMITS, QUESTION_LIMITS, Span, attend_bytes
from transport.attestation.dev_authority import default_directory
from transport.dial_and_listen import listen
from transport.handshake import Role, RoleKind
from transport.tensor_frames import Tensor

NUM_TRIPS = 500


class Echo:
    """Answers with the question's queries, and as many sums."""

    def answer(self, header: bytes, tensors: tuple[Tensor, ...]) -> Message:
        """Of the shape of an answer about encoded rows."""
        del header
        queries = tensors[2]
        return b"", (queries, to_tensor(np.zeros(queries.spec.shape[:2])))

    def close(self) -> None:
        """There is nothing to forget."""


def serve(manifest_json: str) -> None:
    """Echo one session."""
    manifest = parse_manifest(manifest_json)
    assert manifest.part is not None, "planned with an attention worker"
    assert manifest.part.address is not None, "planned with its address"
    where = manifest.part.address.to_endpoint()
    credentials = _trust().toward(Role(RoleKind.STAGE, 0), {})
    server = PartServer(part_link(manifest), credentials, QUESTION_LIMITS, Echo)

    async def main() -> None:
        with listen(where) as listener:
            await server.serve(listener, once=True)

    trio.run(main)


async def median_trip_ms(manifest: Manifest, config: ModelConfig) -> float:
    """The median of some hundred, in milliseconds. manifest: with nobody at its part's address."""
    worker = multiprocessing.get_context("spawn").Process(
        target=serve, args=(dump_manifest(manifest),), daemon=True
    )
    worker.start()
    heads, width = config.num_kv_heads, config.head_dim
    num_queries = config.num_heads // heads
    shapes = ((heads, 1, width), (heads, 1, width), (heads, num_queries, width))
    tensors = tuple(to_tensor(np.zeros(shape, FLOAT32)) for shape in shapes)
    header = attend_bytes(0, [Span(0, 1000, 1, num_queries, (1001,))])
    try:
        access = PartAccess(manifest, _trust(), RemoteParts(ANSWER_LIMITS))
        link = await access.dial(lambda line: None)
        took = []
        for _ in range(NUM_TRIPS):
            started = perf_counter()
            link.ask(header, tensors)
            took.append(perf_counter() - started)
        link.close()
    finally:
        worker.terminate()
        worker.join()
    return 1e3 * statistics.median(took)


def _trust() -> DevTrust:
    return DevTrust.create(default_directory(os.environ))
