"""The older proto's service, as the official client uses it."""

import threading

import grpc
import pytest
import trio

from pipeline.doors.faults import GRPC_STATUSES
from pipeline.doors.messages import (
    AttestRequest,
    DoorError,
    DoorFault,
    InferRequest,
)
from pipeline.doors.protobuf import (
    decode_attest_response_untrusted,
    decode_infer_response_untrusted,
    encode,
)
from pipeline.gateway.http.tls import load_tls

SERVICE = "/infemeral.TensorInference/"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def encoded(embedding=b"sealed", **more):
    fields = {"shape": (1, 2), "dtype": "float32", "session_id": "s"} | more
    return b"".join(encode(InferRequest(embedding, b"key", b"nonce", **fields)))


def channel_to(port, tls_ca=None):
    if tls_ca is None:
        return grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS)
    credentials = grpc.ssl_channel_credentials(tls_ca.read_bytes())
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=OPTIONS)


async def call(port, body, method="Infer", tls_ca=None, **arguments):
    """The answer's bytes, or the RpcError."""

    def run():
        with channel_to(port, tls_ca) as channel:
            try:
                return channel.unary_unary(SERVICE + method)(body, timeout=300, **arguments)
            except grpc.RpcError as error:
                return error

    return await trio.to_thread.run_sync(run)


async def test_the_official_client_gets_its_answer(serve_door):
    async with serve_door() as served:
        answer = decode_infer_response_untrusted(
            await call(served.grpc, encoded(b"x" * 3000, max_new_tokens=3, temperature=0.5))
        )
        (request,) = served.door.requests
        assert bytes(answer.output) == b"x" * 3000
        assert (answer.shape, answer.dtype, answer.tokens_processed) == ((1, 2), "float32", 7)
        assert (request.max_new_tokens, request.temperature) == (3, 0.5)
        assert bytes(request.encrypted_session_key) == b"key"


async def test_evidence_is_asked_for_in_the_same_service(serve_door, shown_key):
    async with serve_door() as served:
        body = b"".join(encode(AttestRequest(b"n" * 32)))
        answer = await call(served.grpc, body, "Attest")
        assert decode_attest_response_untrusted(answer) == shown_key
        assert served.door.requests == [AttestRequest(b"n" * 32)]


async def test_the_official_client_is_served_over_tls(serve_door, certificate):
    async with serve_door(tls_grpc=load_tls(*certificate, protocol="h2")) as served:
        answer = await call(served.grpc, encoded(), tls_ca=certificate[0])
        assert bytes(decode_infer_response_untrusted(answer).output) == b"sealed"


async def test_calls_of_one_connection_run_side_by_side(serve_door):
    async with serve_door() as served:
        met = trio.Event()

        async def meet():
            if len(served.door.requests) == 8:
                met.set()
            await met.wait()

        served.door.before = meet

        def run():
            with channel_to(served.grpc) as channel:
                infer = channel.unary_unary(f"{SERVICE}Infer")
                calls = [infer.future(encoded(b"%d" % i), timeout=300) for i in range(8)]
                return [bytes(decode_infer_response_untrusted(c.result()).output) for c in calls]

        assert await trio.to_thread.run_sync(run) == [b"%d" % i for i in range(8)]


@pytest.mark.parametrize("fault", DoorFault)
async def test_each_fault_has_its_status_and_names_itself(serve_door, fault):
    async with serve_door() as served:
        served.door.fault = DoorError(fault, "50 % of it\nis ünreadable")
        error = await call(served.grpc, encoded())
        assert error.code().value[0] == GRPC_STATUSES[fault]
        assert error.details() == "50 % of it\nis ünreadable"
        assert dict(error.trailing_metadata())["veilpipe-fault"] == fault.value


async def test_a_wrong_key_comes_with_the_right_one(serve_door, shown_key):
    async with serve_door() as served:
        served.door.fault = DoorError(DoorFault.WRONG_KEY, "sealed to another", shown_key)
        error = await call(served.grpc, encoded())
        encoded_key = dict(error.trailing_metadata())["veilpipe-key-bin"]
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert decode_attest_response_untrusted(encoded_key) == shown_key


async def test_a_defect_is_told_without_its_text(serve_door, caplog):
    async with serve_door() as served:
        served.door.fault = KeyError("SECRET")
        error = await call(served.grpc, encoded())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "SECRET" not in error.details() + caplog.text
        assert "error=KeyError" in caplog.text


async def test_a_deadline_stops_the_work(serve_door):
    async with serve_door() as served:
        served.door.before = trio.sleep_forever

        def run():
            with channel_to(served.grpc) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    channel.unary_unary(f"{SERVICE}Infer")(encoded(), timeout=1)
                return caught.value.code()

        while not served.door.requests:  # on a busy machine one may not come as far in its time
            assert await trio.to_thread.run_sync(run) is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: served.door.num_cancelled == len(served.door.requests))


async def test_a_cancelled_call_stops_the_work_and_no_other(serve_door):
    async with serve_door() as served:
        served.door.before = trio.sleep_forever
        began = threading.Event()

        def run():
            with channel_to(served.grpc) as channel:
                infer = channel.unary_unary(f"{SERVICE}Infer")
                pending = infer.future(encoded(b"one"))
                assert began.wait(300)
                pending.cancel()
                return infer(encoded(b"two"), timeout=300)

        async with trio.open_nursery() as nursery:

            async def release():
                await until(lambda: served.door.requests)
                served.door.before = None
                began.set()

            nursery.start_soon(release)
            answer = await trio.to_thread.run_sync(run)
        assert bytes(decode_infer_response_untrusted(answer).output) == b"two"
        await until(lambda: served.door.num_cancelled == 1)


async def test_compressed_messages_are_refused_and_nothing_breaks(serve_door):
    async with serve_door() as served:
        error = await call(served.grpc, encoded(b"x" * 5000), compression=grpc.Compression.Gzip)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "compressed" in error.details()
        assert not isinstance(await call(served.grpc, encoded()), grpc.RpcError)


@pytest.mark.parametrize(
    ("method", "body", "status"),
    [
        ("Nothing", b"", "UNIMPLEMENTED"),
        ("Infer", b"\xff\xff", "INVALID_ARGUMENT"),
        ("Attest", b"\x0a\x05abc", "INVALID_ARGUMENT"),
    ],
)
async def test_bad_calls_get_a_status(serve_door, method, body, status):
    async with serve_door() as served:
        error = await call(served.grpc, body, method)
        assert error.code().name == status
        assert not served.door.requests


async def test_a_large_message_arrives_whole_and_a_larger_one_is_refused(serve_door, monkeypatch):
    monkeypatch.setattr("pipeline.doors.grpc_app.MAX_MESSAGE_BYTES", 5 << 20)
    async with serve_door() as served:
        body = bytes(range(256)) * (4 << 12)
        answer = await call(served.grpc, encoded(body))
        assert decode_infer_response_untrusted(answer).output == body
        error = await call(served.grpc, encoded(bytes(6 << 20)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(served.door.requests) == 1


async def until(condition):
    with trio.fail_after(120):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
