import re
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from transport.attestation import cbor, cose, document_verifier
from transport.attestation.attestation_document import NUM_PCRS, Document, parse
from transport.attestation.document_verifier import (
    CLOCK_SKEW,
    MAX_EVIDENCE_BYTES,
    NitroVerifier,
    aws_root,
    examine,
    read_document,
)
from transport.attestation.evidence_binding import Binding, EvidenceKind
from transport.errors import AttestationError, MisuseError

VALID = ("valid-2024-09-17.cbor", "valid-2024-11-14.cbor")
ALL_CHECKS = [
    *("cose", "document", "root", "chain", "validity", "signature", "timestamp", "debug"),
    *("pcrs", "user_data", "public_key", "nonce"),
]


def stated_time(document):
    return datetime.fromtimestamp(read_document(document).timestamp_ms / 1000, UTC)


def failed(results):
    return [result.name for result in results if not result.ok]


def examine_recorded(document, now, **changes):
    fields = {"root": aws_root(), "now": now, "expected": None, "allow_debug": True}
    return examine(document, **{**fields, **changes})


# --- recorded documents ----------------------------------------------------------------------


@pytest.mark.parametrize("name", VALID)
def test_recorded_document_passes_at_its_own_time_and_not_three_hours_later(recorded, name):
    document = recorded(name)
    now = stated_time(document)
    assert failed(examine_recorded(document, now)) == []
    later = examine_recorded(document, now + timedelta(hours=3))
    assert failed(later) == ["validity", "timestamp"]


def test_recorded_document_with_a_bad_signature_is_refused(recorded):
    document = recorded("invalid-signature.cbor")
    assert failed(examine_recorded(document, stated_time(document))) == ["signature"]


@pytest.mark.parametrize("name", VALID)
def test_recorded_debug_document_is_refused_unless_allowed(recorded, name):
    document = recorded(name)
    results = examine_recorded(document, stated_time(document), allow_debug=False)
    assert failed(results) == ["debug"]


def test_recorded_document_does_not_reach_another_root(recorded, chain):
    document = recorded(VALID[0])
    results = examine_recorded(document, stated_time(document), root=chain[0].certificate)
    assert failed(results) == ["root", "chain", "validity", "signature"]


@pytest.mark.parametrize("name", VALID)
def test_every_mutated_byte_of_a_recorded_document_is_refused(recorded, name):
    document = recorded(name)
    now = stated_time(document)
    verifier = document_verifier.ChainVerifier(aws_root())
    for position in [*range(40), *range(40, len(document), 13)]:
        altered = bytearray(document)
        altered[position] ^= 1 << (position % 8)
        examination = document_verifier._Examination(
            bytes(altered), verifier, now, document_verifier.Policy(None, allow_debug=True), None
        )
        assert failed(examination.results()), f"byte {position}"


@pytest.mark.parametrize("name", VALID)
def test_every_truncation_of_a_recorded_document_is_refused(recorded, name):
    document = recorded(name)
    for length in range(0, len(document), 97):
        with pytest.raises(AttestationError):
            read_document(document[:length])


def test_every_changed_field_of_a_recorded_document_is_refused(recorded):
    document = recorded(VALID[0])
    now = stated_time(document)
    sign1 = cose.parse(document)
    fields = cbor.decode(sign1.payload)
    for name, value in {
        "module_id": "i-other",
        "timestamp": fields["timestamp"] + 1,
        "pcrs": {**fields["pcrs"], 0: b"\x01" * 48},
        "certificate": fields["cabundle"][-1],
        "cabundle": fields["cabundle"][:-1],
        "public_key": b"other",
        "user_data": None,
        "nonce": b"",
    }.items():
        payload = cbor.encode({**fields, name: value})
        altered = cbor.encode([sign1.protected, {}, payload, sign1.signature])
        assert "signature" in failed(examine_recorded(altered, now)), name


def test_repeat_verification_of_a_recorded_chain_reads_one_certificate(recorded, monkeypatch):
    read = read_document(recorded(VALID[0]))
    verifier = document_verifier.ChainVerifier(aws_root())
    verifier.verify(read.certificate, read.cabundle)
    monkeypatch.setattr(verifier, "_verify_bundle", None)  # would fail if it were called again
    verifier.verify(read.certificate, read.cabundle)


def test_pinned_root_is_the_published_one(recorded):
    pem = recorded("aws-nitro-root-g1.pem")
    assert aws_root().public_bytes(Encoding.PEM) == pem


def test_another_root_file_is_not_taken_for_the_pinned_one(monkeypatch):
    monkeypatch.setattr(document_verifier, "AWS_ROOT_SHA256", "00" * 32)
    with pytest.raises(MisuseError, match="expected 00"):
        aws_root()


# --- synthetic documents ---------------------------------------------------------------------


@pytest.fixture
def verify(synthetic, chain):
    """Verifies evidence as a stage of the synthetic chain would be."""

    def run(evidence, binding, **changes):
        expected = changes.pop("expected", {0: synthetic.pcrs[0], 31: synthetic.pcrs[31]})
        now = changes.pop("now", synthetic.now)
        verifier = NitroVerifier(chain[0].certificate, expected, clock=lambda: now, **changes)
        return verifier.verify(evidence, binding)

    return run


@pytest.fixture
def refused(verify):
    def run(evidence, binding, **changes):
        with pytest.raises(AttestationError) as caught:
            verify(evidence, binding, **changes)
        return caught.value.check

    return run


def test_bound_document_is_vouched_for_with_all_its_measurements(verify, synthetic, chain, binding):
    attested = verify(synthetic.evidence(chain, binding), binding)
    assert attested.kind is EvidenceKind.NITRO
    assert attested.measurements == synthetic.pcrs


def test_all_checks_are_listed_by_name(synthetic, chain, binding):
    results = examine(
        synthetic.evidence(chain, binding),
        root=chain[0].certificate,
        now=synthetic.now,
        expected=synthetic.pcrs,
        binding=binding,
    )
    assert [result.name for result in results] == ALL_CHECKS
    assert failed(results) == []


def test_unreadable_document_fails_every_check_by_name(synthetic, chain, binding):
    results = examine(
        b"junk",
        root=chain[0].certificate,
        now=synthetic.now,
        expected=synthetic.pcrs,
        binding=binding,
    )
    assert failed(results) == ALL_CHECKS


@pytest.mark.parametrize(
    ("field", "value", "check"),
    [
        ("role", b"stage/2", "user_data"),
        ("role", b"orchestrator", "user_data"),
        ("handshake_hash", b"H" * 32, "user_data"),
        ("static_key", b"S" * 32, "public_key"),
        ("nonce", b"N" * 32, "nonce"),
    ],
)
def test_document_bound_to_anything_else_is_refused(
    refused, synthetic, chain, binding, field, value, check
):
    fields = {name: getattr(binding, name) for name in Binding.__slots__}
    other = Binding(**{**fields, field: value})
    assert refused(synthetic.evidence(chain, other), binding) == check


@pytest.mark.parametrize("name", ["user_data", "public_key", "nonce"])
@pytest.mark.parametrize("value", [None, b""])
def test_document_without_a_bound_field_is_refused(refused, synthetic, chain, binding, name, value):
    assert refused(synthetic.evidence(chain, binding, **{name: value}), binding) == name


def test_debug_mode_is_refused_by_default_and_taken_where_allowed(
    refused, verify, synthetic, chain, binding
):
    pcrs = {**synthetic.pcrs, 0: bytes(48)}
    evidence = synthetic.evidence(chain, binding, pcrs=pcrs)
    expected = {0: bytes(48)}
    assert refused(evidence, binding, expected=expected) == "debug"
    assert verify(evidence, binding, expected=expected, allow_debug=True).measurements == pcrs


def test_document_without_pcr_0_is_refused(refused, synthetic, chain, binding):
    evidence = synthetic.evidence(chain, binding, pcrs={1: b"\x11" * 48})
    expected = {1: b"\x11" * 48}
    assert refused(evidence, binding, expected=expected, allow_debug=True) == "debug"


@pytest.mark.parametrize("index", [0, 1, 2, 31])
def test_every_pinned_register_is_compared(refused, synthetic, chain, binding, index):
    expected = {**synthetic.pcrs, index: b"\xee" * 48}
    assert refused(synthetic.evidence(chain, binding), binding, expected=expected) == "pcrs"


def test_pinned_register_that_the_document_lacks_is_refused(refused, synthetic, chain, binding):
    expected = {**synthetic.pcrs, 8: bytes(48)}
    assert refused(synthetic.evidence(chain, binding), binding, expected=expected) == "pcrs"


def test_unpinned_verifier_is_misuse_and_its_check_fails(synthetic, chain, binding):
    with pytest.raises(MisuseError, match="no measurements are pinned"):
        NitroVerifier(chain[0].certificate, {}, clock=lambda: synthetic.now)
    results = examine(
        synthetic.evidence(chain), root=chain[0].certificate, now=synthetic.now, expected={}
    )
    assert failed(results) == ["pcrs"]


@pytest.mark.parametrize("expected", [{32: bytes(48)}, {-1: bytes(48)}, {0: bytes(32)}])
def test_measurements_no_register_can_hold_are_misuse(synthetic, chain, expected):
    with pytest.raises(MisuseError, match="is not a PCR"):
        NitroVerifier(chain[0].certificate, expected, clock=lambda: synthetic.now)


def test_changing_the_pins_after_construction_has_no_effect(synthetic, chain, binding):
    expected = {0: b"\xee" * 48}
    verifier = NitroVerifier(chain[0].certificate, expected, clock=lambda: synthetic.now)
    expected[0] = synthetic.pcrs[0]
    with pytest.raises(AttestationError, match="pcrs"):
        verifier.verify(synthetic.evidence(chain, binding), binding)


@pytest.mark.parametrize("sign", [1, -1])
def test_timestamp_apart_from_the_clock_is_refused(
    refused, verify, synthetic, chain, binding, sign
):
    evidence = synthetic.evidence(chain, binding)
    verify(evidence, binding, now=synthetic.now + sign * CLOCK_SKEW)
    late = synthetic.now + sign * (CLOCK_SKEW + timedelta(seconds=1))
    assert refused(evidence, binding, now=late) == "timestamp"


@pytest.mark.parametrize("timestamp_ms", [1, 2**63, 2**64 - 1])
def test_timestamp_that_is_no_date_is_refused(refused, synthetic, chain, binding, timestamp_ms):
    evidence = synthetic.evidence(chain, binding, timestamp_ms=timestamp_ms)
    assert refused(evidence, binding) == "timestamp"


def test_remembered_chain_is_still_judged_by_the_clock(synthetic, chain, binding):
    times = iter([synthetic.now, synthetic.now + timedelta(days=2)])
    verifier = NitroVerifier(chain[0].certificate, synthetic.pcrs, clock=lambda: next(times))
    evidence = synthetic.evidence(chain, binding)
    verifier.verify(evidence, binding)
    with pytest.raises(AttestationError, match="validity"):
        verifier.verify(evidence, binding)


def test_unsigned_document_of_an_emulated_module_is_refused(refused, synthetic, chain, binding):
    payload = synthetic.document(chain, binding).encode()
    emulated = cbor.encode([cbor.encode({1: -1}), {}, payload, bytes(96)])
    assert refused(emulated, binding, allow_debug=True) == "cose"
    renamed = cbor.encode([cbor.encode({1: -35}), {}, payload, bytes(96)])
    assert refused(renamed, binding, allow_debug=True) == "signature"


def test_document_signed_by_another_leaf_is_refused(refused, synthetic, chain, binding):
    payload = synthetic.document(chain, binding).encode()
    other = ec.generate_private_key(ec.SECP384R1())
    assert refused(cose.sign(payload, other), binding) == "signature"
    assert refused(cose.sign(payload, chain[2].key), binding) == "signature"


def test_document_over_its_size_is_refused(refused, binding):
    assert refused(bytes(MAX_EVIDENCE_BYTES + 1), binding) == "cose"


def test_indefinite_lengths_and_the_last_register_are_read(verify, synthetic, chain, binding):
    def chunked(head, items):
        return bytes([head << 5 | 31]) + b"".join(items) + b"\xff"

    fields = cbor.decode(synthetic.document(chain, binding).encode())
    fields["pcrs"] = {index: bytes([index + 1]) * 48 for index in range(NUM_PCRS)}
    entries = {
        **{name: cbor.encode(value) for name, value in fields.items()},
        "pcrs": chunked(5, [cbor.encode(i) + cbor.encode(d) for i, d in fields["pcrs"].items()]),
        "cabundle": chunked(4, map(cbor.encode, fields["cabundle"])),
        "nonce": chunked(2, [cbor.encode(binding.nonce[:9]), cbor.encode(binding.nonce[9:])]),
    }
    payload = chunked(5, [cbor.encode(name) + value for name, value in entries.items()])
    evidence = cose.sign(payload, chain[-1].key)
    attested = verify(evidence, binding, expected={31: b"\x20" * 48})
    assert attested.measurements == fields["pcrs"]


# --- the document's fields -------------------------------------------------------------------

FIELDS = {
    "module_id": "i-0",
    "digest": "SHA384",
    "timestamp": 1,
    "pcrs": {0: bytes(48)},
    "certificate": b"c",
    "cabundle": [b"r"],
    "public_key": None,
    "user_data": None,
    "nonce": None,
}


def test_optional_fields_may_be_absent_or_null():
    required = {name: value for name, value in FIELDS.items() if value is not None}
    expected = Document("i-0", 1, {0: bytes(48)}, b"c", (b"r",))
    assert parse(cbor.encode(required)) == parse(cbor.encode(FIELDS)) == expected


@pytest.mark.parametrize(
    "name", ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"]
)
def test_missing_field_is_refused(name):
    fields = {key: value for key, value in FIELDS.items() if key != name}
    with pytest.raises(AttestationError, match=f"lacks {name}"):
        parse(cbor.encode(fields))


@pytest.mark.parametrize("payload", [[], 1, "text", b"bytes", None])
def test_payload_that_is_no_map_is_refused(payload):
    with pytest.raises(AttestationError, match="expected a map"):
        parse(cbor.encode(payload))


@pytest.mark.parametrize("name", ["extra", 7])
def test_unknown_field_is_refused(name):
    entries = {cbor.encode(key): cbor.encode(value) for key, value in FIELDS.items()}
    entries[cbor.encode(name)] = b"\x00"
    payload = bytes([5 << 5 | len(entries)]) + b"".join(k + v for k, v in entries.items())
    with pytest.raises(AttestationError, match="unknown fields " + re.escape(repr(name))):
        parse(payload)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("module_id", v) for v in ["", "x" * 257, b"i-0", 1, None]),
        *(("digest", v) for v in ["SHA256", "SHA512", "sha384", b"SHA384", None, 384]),
        *(("timestamp", v) for v in [0, -1, True, "1", None]),
        *(("pcrs", v) for v in [{}, [], None, {32: bytes(48)}, {-1: bytes(48)}]),
        *(("pcrs", v) for v in [{"0": bytes(48)}, {0: bytes(32)}, {0: bytes(64)}, {0: "0" * 48}]),
        *(("pcrs", v) for v in [{0: None}, {0: b""}]),
        *(("certificate", v) for v in [b"", bytes(1025), "c", None]),
        *(("cabundle", v) for v in [[], None, b"r", [b""], [bytes(1025)], ["r"], [b"r", None]]),
        *(("public_key", v) for v in [bytes(1025), "k", 1, []]),
        *(("user_data", v) for v in [bytes(513), "u", False]),
        *(("nonce", v) for v in [bytes(513), "n", {}]),
    ],
)
def test_field_of_wrong_type_or_size_is_refused(name, value):
    with pytest.raises(AttestationError) as caught:
        parse(cbor.encode({**FIELDS, name: value}))
    assert caught.value.check == "document"
