import ctypes
import errno
import struct
from pathlib import Path

import pytest

from transport.attestation import cbor
from transport.attestation.document_verifier import NitroVerifier
from transport.attestation.evidence_binding import EvidenceKind, user_data
from transport.attestation.nsm import MAX_RESPONSE_BYTES, NSM_IOCTL, Nsm, NsmAttester
from transport.errors import DeviceError, MisuseError

DESCRIPTION = {
    "DescribeNSM": {
        "version_major": 1,
        "version_minor": 2,
        "version_patch": 3,
        "module_id": "i-0-enc0",
        "max_pcrs": 32,
        "locked_pcrs": [0, 1, 2],
        "digest": "SHA384",
    }
}


class FakeDevice:
    """Answers the ioctl in the caller's memory, as the kernel does."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []

    def ioctl(self, descriptor, number, raw, mutate):
        assert number == NSM_IOCTL
        assert mutate
        request_at, request_bytes, response_at, response_bytes = struct.unpack("=QQQQ", raw)
        request = cbor.decode(ctypes.string_at(request_at, request_bytes))
        self.requests.append(request)
        answer = self.answer(request) if callable(self.answer) else self.answer
        response = answer if isinstance(answer, bytes) else cbor.encode(answer)
        assert len(response) <= response_bytes == MAX_RESPONSE_BYTES
        ctypes.memmove(response_at, response, len(response))
        raw[:] = struct.pack("=QQQQ", request_at, request_bytes, response_at, len(response))
        return 0


@pytest.fixture
def nsm():
    """A module whose device is any readable file and whose ioctl is the fake's."""

    def make(answer):
        device = FakeDevice(answer)
        return Nsm(Path("/dev/null"), ioctl=device.ioctl), device

    return make


def test_module_describes_itself(nsm):
    module, device = nsm(DESCRIPTION)
    description = module.describe()
    assert device.requests == ["DescribeNSM"]
    assert description.version == (1, 2, 3)
    assert description.max_pcrs == 32
    assert description.locked_pcrs == {0, 1, 2}


def test_register_is_read(nsm):
    module, device = nsm({"DescribePCR": {"lock": True, "data": b"\x07" * 48}})
    pcr = module.describe_pcr(16)
    assert device.requests == [{"DescribePCR": {"index": 16}}]
    assert (pcr.digest, pcr.is_locked) == (b"\x07" * 48, True)


@pytest.mark.parametrize("index", [-1, 32])
def test_register_out_of_range_is_not_asked_for(nsm, index):
    module, device = nsm({})
    with pytest.raises(MisuseError):
        module.describe_pcr(index)
    assert device.requests == []


def test_random_bytes_are_given(nsm):
    module, device = nsm({"GetRandom": {"random": b"\x05" * 256}})
    assert module.random() == b"\x05" * 256
    assert device.requests == ["GetRandom"]


def test_indefinite_answer_is_read(nsm):
    module, _ = nsm(b"\xbf\x69GetRandom\xbf\x66random\x41\x05\xff\xff")
    assert module.random() == b"\x05"


def test_attester_binds_the_document_to_the_handshake(binding, synthetic, chain):
    def answer(request):
        if request == "DescribeNSM":
            return DESCRIPTION
        return {"Attestation": {"document": synthetic.evidence(chain, **request["Attestation"])}}

    device = FakeDevice(answer)
    attester = NsmAttester(Path("/dev/null"), ioctl=device.ioctl)
    assert attester.kind is EvidenceKind.NITRO
    evidence = attester.attest(binding)
    assert device.requests[-1] == {
        "Attestation": {
            "user_data": user_data(binding),
            "public_key": binding.static_key,
            "nonce": binding.nonce,
        }
    }
    verifier = NitroVerifier(chain[0].certificate, synthetic.pcrs, clock=lambda: synthetic.now)
    assert verifier.verify(evidence, binding).measurements == synthetic.pcrs


@pytest.mark.parametrize(
    "answer",
    [
        {"Error": "InvalidOperation"},
        {},
        {"DescribeNSM": {}},
        {"GetRandom": {}},
        {"GetRandom": {"random": b""}},
        {"GetRandom": {"random": "text"}},
        {"GetRandom": {"random": b"x"}, "More": 1},
        "GetRandom",
        b"",
        b"\xff",
        b"\x00\x00",
    ],
)
def test_any_other_answer_is_an_error_that_names_the_device(nsm, answer):
    module, _ = nsm(answer)
    with pytest.raises(DeviceError, match="/dev/null"):
        module.random()


@pytest.mark.parametrize("digest", [b"", bytes(32), bytes(49), "0" * 48])
def test_register_of_another_size_is_an_error(nsm, digest):
    module, _ = nsm({"DescribePCR": {"lock": False, "data": digest}})
    with pytest.raises(DeviceError):
        module.describe_pcr(0)


@pytest.mark.parametrize("document", [b"", "text", None])
def test_attestation_without_document_is_an_error(nsm, document):
    module, _ = nsm({"Attestation": {"document": document}})
    with pytest.raises(DeviceError):
        module.attest(user_data=b"u", public_key=b"k", nonce=b"n")


def test_request_over_the_drivers_limit_is_misuse(nsm):
    module, device = nsm({})
    with pytest.raises(MisuseError):
        module.attest(user_data=bytes(5000), public_key=b"", nonce=b"")
    assert device.requests == []


def test_missing_device_is_refused_at_construction_with_a_remedy(tmp_path):
    with pytest.raises(DeviceError, match="run inside a Nitro Enclave"):
        NsmAttester(tmp_path / "nsm")


def test_device_that_is_no_security_module_is_refused():
    with pytest.raises(DeviceError, match="run inside a Nitro Enclave"):
        NsmAttester(Path("/dev/null"))  # the real ioctl


def test_refused_ioctl_is_translated():
    def fail(*_):
        raise OSError(errno.EMSGSIZE, "Message too long")

    with pytest.raises(DeviceError, match="Message too long"):
        Nsm(Path("/dev/null"), ioctl=fail).random()


def test_answer_longer_than_its_buffer_is_refused():
    def overlong(descriptor, number, raw, mutate):
        raw[24:] = struct.pack("=Q", MAX_RESPONSE_BYTES + 1)
        return 0

    with pytest.raises(DeviceError, match="claims"):
        Nsm(Path("/dev/null"), ioctl=overlong).random()
