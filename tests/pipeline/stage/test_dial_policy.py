"""What an orchestrator may have a stage dial, and what not."""

from ipaddress import ip_address

import pytest

from pipeline.agreement.addresses import StageEndpoint, TcpAddress, UnixAddress, VsockAddress
from pipeline.agreement.manifest import StageSpec
from pipeline.errors import InputError, SessionRefused
from pipeline.stage.dial_policy import DialPolicy, parse_networks
from transport.dial_and_listen import TcpEndpoint, UnixEndpoint, VsockEndpoint


def tcp(text):
    return TcpAddress(type="tcp", addr=text)


def policy(*networks, data_out=None):
    endpoint = data_out and StageEndpoint(
        control=tcp("10.0.0.1:1"), data_in=tcp("10.0.0.1:2"), data_out=data_out
    )
    spec = StageSpec(stage_idx=4, layer_start=0, layer_end=1, endpoint=endpoint)
    return DialPolicy(spec, parse_networks(networks))


def test_what_the_manifest_names_for_the_stage_may_be_dialed_and_nothing_else():
    named = policy(data_out=tcp("next.example:9011"))
    target = named.target("tcp:next.example:9011")
    assert (target.endpoint, target.permit) == (TcpEndpoint("next.example", 9011), None)
    for text in ("next.example:9012", "127.0.0.1:9011", "10.0.0.1:1", "vsock:3:6000", "unix:/s"):
        with pytest.raises(SessionRefused, match="stage 4 may not dial"):
            named.target(text)


def test_a_unix_path_may_be_dialed_where_the_manifest_names_it():
    named = policy(data_out=UnixAddress(type="unix", path="/run/v.sock", port=5000))
    assert named.target("unix:/run/v.sock:5000").endpoint == UnixEndpoint("/run/v.sock", 5000)
    with pytest.raises(SessionRefused, match="name it in the stage's own manifest"):
        named.target("unix:/run/v.sock:5001")


def test_a_core_alone_allows_the_parent_of_an_enclave():
    for cid in (2, 3):
        assert policy().target(f"vsock:{cid}:6000").endpoint == VsockEndpoint(cid, 6000)
    for text in ("vsock:16:6000", "vsock:any:6000", "10.0.0.5:80", "unix:/s"):
        with pytest.raises(SessionRefused):
            policy().target(text)


def test_a_template_allows_the_parent_at_the_port_that_it_names():
    named = policy(data_out=VsockAddress(type="vsock", cid=0, port=6001))
    for cid in (2, 3):
        assert named.target(f"vsock:{cid}:6001").endpoint == VsockEndpoint(cid, 6001)
    for text in ("vsock:3:6002", "vsock:16:6001", "vsock:0:6001"):
        with pytest.raises(SessionRefused):
            named.target(text)


def test_an_allowed_network_is_one_of_addresses_not_of_names():
    permit = policy("10.1.0.0/16", "fd00::/8").target("next.example:9011").permit
    assert permit(ip_address("10.1.255.255"))
    assert permit(ip_address("fd12::1"))
    assert not permit(ip_address("10.2.0.0"))
    assert not permit(ip_address("fe80::1"))


def test_a_single_address_is_a_network():
    permit = policy("10.1.0.7").target("10.1.0.7:1").permit
    assert permit(ip_address("10.1.0.7"))
    assert not permit(ip_address("10.1.0.8"))


@pytest.mark.parametrize("text", ["10.0.0.1/8", "all", "10.0.0.0/33", "", "10.0.0.0:80"])
def test_what_is_no_network_is_refused_by_the_flags_name(text):
    with pytest.raises(InputError, match=r"--allow-dial: .*10\.0\.0\.0/8"):
        parse_networks([text])
