"""How long the official client waits for a door, beside its own server."""

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import trio

from pipeline.doors.listening import DoorServer, Listening, listen
from pipeline.doors.messages import InferRequest, InferResponse
from pipeline.doors.protobuf import encode

pytestmark = pytest.mark.slow
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
METHOD = "/infemeral.TensorInference/Infer"


class Echo:
    async def infer(self, request):
        return InferResponse(request.cloaked_embedding, request.shape, request.dtype, 1)


def serve_door(port):
    async def main():
        listeners = await listen("127.0.0.1", 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(DoorServer(Echo()).serve, Listening(listeners, None), None)
            port.put(listeners[0].socket.getsockname()[1])

    trio.run(main)


def serve_theirs(port):
    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: request)

    server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
    server.add_generic_rpc_handlers((Handler(),))
    port.put(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


@pytest.fixture
def both():
    """Calls of grpcio's own echo and of a door's, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    processes, channels = [], []
    for target in (serve_theirs, serve_door):
        port = context.Queue()
        processes.append(context.Process(target=target, args=(port,), daemon=True))
        processes[-1].start()
        channels.append(grpc.insecure_channel(f"127.0.0.1:{port.get()}", options=OPTIONS))
    yield [channel.unary_unary(METHOD) for channel in channels]
    for channel in channels:
        channel.close()
    for process in processes:
        process.kill()
        process.join()


def best_seconds(calls, num_bytes, rounds):
    """The shortest that each took, in turns, so that both meet the machine as it is."""
    body = b"".join(encode(InferRequest(bytes(num_bytes), b"", b"", (1,), "F32", "s")))
    found = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call(body)
            found[i] = min(found[i], time.perf_counter() - begin)
    return found


def test_a_small_call_takes_a_millisecond_more_than_grpcios_own(both):
    theirs, ours = best_seconds(both, 3000, 300)
    assert ours - theirs < 1e-3, (theirs, ours)


def test_large_calls_take_six_times_grpcios_own_and_grow_with_their_size(both):
    found = {size: best_seconds(both, size, 3) for size in (25_000_000, 50_000_000, 100_000_000)}
    theirs, ours = found[100_000_000]
    assert ours < 6 * theirs, found
    assert ours < 1.6 * 4 * found[25_000_000][1], found
