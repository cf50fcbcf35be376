"""HTTPS."""

import logging
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import openai
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from pipeline.errors import InputError
from pipeline.gateway.http.tls import load_tls

KEY = "sk-test-0123456789"


def write_pair(directory, name, encryption=None):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = directory / f"{name}.crt", directory / f"{name}.key"
    cert_path.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    )
    return cert_path, key_path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("tls"), "server")


@pytest.fixture
def trusting(pair):
    return ssl.create_default_context(cafile=str(pair[0]))


async def test_openais_client_is_served_over_https(start_gateway, pair):
    def use(url):
        import httpx

        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(pair[0])))
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=300, http_client=trusting
        ) as client:
            create = client.chat.completions.create
            arguments = {"model": "tiny/model", "messages": [{"role": "user", "content": "Hi"}]}
            whole = create(**arguments).choices[0].message.content
            chunks = list(create(**arguments, stream=True))
            return whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    async with start_gateway(tls=load_tls(*pair)) as gateway:
        assert gateway.url.startswith("https://127.0.0.1:")
        assert await trio.to_thread.run_sync(use, gateway.url) == ("Hello, wörld!",) * 2


async def until_idle(gateway):
    with trio.fail_after(120):
        while gateway.metric("veilpipe_http_connections"):  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01", b"\x00" * 1000, b""]
)
async def test_who_shakes_no_hands_is_not_served(start_gateway, pair, junk, caplog):
    async with start_gateway(tls=load_tls(*pair), header_seconds=0.3) as gateway:
        async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
            await stream.send_all(junk)
            data = b""
            with trio.fail_after(120):
                try:
                    while more := await stream.receive_some():
                        data += more
                except trio.BrokenResourceError:
                    pass
        assert b"HTTP/1.1" not in data
        await until_idle(gateway)
    assert "connection_failed" not in caplog.text


async def test_a_client_that_leaves_cancels_its_generation(
    start_gateway, pair, trusting, make_engine
):
    engine = make_engine(seconds=0.01, repeats=True)
    request = b'{"model":"tiny/model","stream":true,"messages":[{"role":"user","content":"x"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n"
    async with start_gateway(engine, tls=load_tls(*pair)) as gateway:
        tcp = await trio.open_tcp_stream("127.0.0.1", gateway.port)
        stream = trio.SSLStream(tcp, trusting, server_hostname="127.0.0.1", https_compatible=True)
        await stream.send_all(head % KEY.encode())
        await stream.send_all(b"content-length: %d\r\n\r\n%b" % (len(request), request))
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        await stream.aclose()
        await until_idle(gateway)
        assert engine.num_active == 0


async def test_over_https_others_may_be_served_without_a_warning(make_desk, pair, caplog):
    from dataclasses import replace

    from prometheus_client import CollectorRegistry

    from pipeline.gateway.http.server import serve

    desk = make_desk(tls=load_tls(*pair))
    desk.config = replace(desk.config, host="0.0.0.0")
    async with trio.open_nursery() as nursery:
        url = await nursery.start(_start, serve, desk, CollectorRegistry())
        assert url.startswith("https://0.0.0.0:")
        nursery.cancel_scope.cancel()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def _start(serve, desk, registry, *, task_status):
    await serve(desk, registry, task_status=task_status)


def test_neither_file_is_no_tls_and_one_alone_is_the_users_error(pair):
    assert load_tls(None, None) is None
    for given in ((pair[0], None), (None, pair[1])):
        with pytest.raises(InputError, match="give both"):
            load_tls(*given)


@pytest.mark.parametrize("wrong", ["missing", "empty", "junk", "swapped", "other", "locked", "dir"])
def test_unusable_files_are_the_users_error_in_one_line(tmp_path, pair, wrong):
    certificate, key = pair
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "junk").write_bytes(b"\x00\xff" * 500)
    given = {
        "missing": (tmp_path / "none.crt", key),
        "empty": (tmp_path / "empty", key),
        "junk": (certificate, tmp_path / "junk"),
        "swapped": (key, certificate),
        "other": (certificate, write_pair(tmp_path, "other")[1]),
        "locked": write_pair(tmp_path, "locked", BestAvailableEncryption(b"secret")),
        "dir": (tmp_path, key),
    }[wrong]
    with pytest.raises(InputError, match="cannot use") as caught:
        load_tls(*given)
    assert "\n" not in str(caught.value)
