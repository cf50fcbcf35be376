from pathlib import Path

import pytest

from transport.address import (
    VSOCK_ANY,
    TcpEndpoint,
    UnixEndpoint,
    VsockEndpoint,
    parse_endpoint,
)
from transport.errors import EndpointError


@pytest.mark.parametrize(
    ("text", "endpoint", "canonical"),
    [
        ("127.0.0.1:9000", TcpEndpoint("127.0.0.1", 9000), "tcp:127.0.0.1:9000"),
        ("tcp:host.name:1", TcpEndpoint("host.name", 1), "tcp:host.name:1"),
        ("[::1]:9000", TcpEndpoint("::1", 9000), "tcp:[::1]:9000"),
        ("tcp:[fe80::1%eth0]:5", TcpEndpoint("fe80::1%eth0", 5), "tcp:[fe80::1%eth0]:5"),
        ("localhost:0", TcpEndpoint("localhost", 0), "tcp:localhost:0"),
        ("unix:/run/a.sock", UnixEndpoint(Path("/run/a.sock")), "unix:/run/a.sock"),
        ("unix:/run/v.sock:5000", UnixEndpoint(Path("/run/v.sock"), 5000), "unix:/run/v.sock:5000"),
        ("unix:a:b", UnixEndpoint(Path("a:b")), "unix:a:b"),
        ("vsock:16:5000", VsockEndpoint(16, 5000), "vsock:16:5000"),
        ("vsock:any:5000", VsockEndpoint(VSOCK_ANY, 5000), "vsock:any:5000"),
    ],
)
def test_address_is_parsed_and_its_canonical_text_parses_to_the_same(text, endpoint, canonical):
    assert parse_endpoint(text) == endpoint
    assert str(endpoint) == canonical
    assert parse_endpoint(canonical) == endpoint


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("host", "'host'"),
        ("host:", "''"),
        (":9000", "':9000'"),
        ("::1:9000", "'::1:9000'"),
        ("[::1]", "'[::1]'"),
        ("[::1:9000", "'[::1:9000'"),
        ("[host]:1", "'[host]:1'"),
        ("host:nine", "'nine'"),
        ("host:-1", "'-1'"),
        ("host:٣", "'٣'"),
        ("host:70000", "70000"),
        ("ho st:1", "'ho st'"),
        ("http://host:1", "'http://host:1'"),
        ("unix:", "not a socket path"),
        ("unix:/x:99999999999", "'99999999999'"),
        ("unix:/x:4294967296", "4294967296"),
        ("unix:/" + "x" * 107, "108 bytes"),
        ("unix:/" + "x" * 104 + ":50", "108 bytes"),
        ("vsock:16", "'vsock:16'"),
        ("vsock:a:1", "'a'"),
        ("vsock:16:", "''"),
        ("vsock:4294967296:1", "4294967296"),
    ],
)
def test_bad_address_is_named_with_a_remedy(text, named):
    with pytest.raises(EndpointError, match=r"write|choose") as caught:
        parse_endpoint(text)
    assert named in str(caught.value)


def test_unix_path_that_would_read_as_a_port_is_refused():
    with pytest.raises(EndpointError, match="ends like a port"):
        UnixEndpoint(Path("/run/a:5"))
